"""The roles of tensors: what tensors a model can have, and what each is usually called in each kind of file.

A tensor is known by a `Key`. The table `ROLES` has the usual names; `names` finds the key of a name in a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Key(NamedTuple):
    """A tensor of the model; `layer` is -1 for the global ones, `expert` -1 for what experts do not have."""

    role: str
    layer: int = -1
    expert: int = -1


@dataclass(frozen=True)
class Role:
    """One row of the table. `{l}` and `{e}` stand for the layer's and the expert's number.

    `hf` and `gguf` name the tensor of a layer without experts (or a global one), `*_expert` one expert's tensor,
    `*_stacked` all experts' in one, experts outermost. The first name is the usual one. Hugging Face names come without
    the "model." with which they begin in all but base-model checkpoints. `quantisable`: `quantize = ...` applies.
    `by_columns`: shards hold columns of it, so its blocks must be narrow enough. `exact`: BF16 becomes F32, because
    products with BF16 round their activations, and a router that sees rounded ones chooses other experts.
    `flat`: a vector that files have with more dimensions. `one_row`: a vector that files may have as a matrix of one
    row, or a matrix of one row that they may have as a vector. `by_heads`: a matrix for each head, one under the other,
    which GGUF files hold as three dimensions.
    """

    name: str
    ndim: int
    hf: str
    gguf: str
    quantisable: bool = False
    by_columns: bool = False
    exact: bool = False
    flat: bool = False
    one_row: bool = False
    by_heads: bool = False
    hf_expert: tuple[str, ...] = ()
    hf_stacked: tuple[str, ...] = ()
    gguf_expert: tuple[str, ...] = ()
    gguf_stacked: tuple[str, ...] = ()


def _vector(name: str, hf: str, gguf: str) -> Role:
    return Role(name, 1, f"layers.{{l}}.{hf}", f"blk.{{l}}.{gguf}")


def _matrix(name: str, hf: str, gguf: str, by_columns: bool = False) -> Role:
    return Role(name, 2, f"layers.{{l}}.{hf}", f"blk.{{l}}.{gguf}", quantisable=True, by_columns=by_columns)


def _exact(name: str, hf: str, gguf: str) -> Role:
    return Role(name, 2, f"layers.{{l}}.{hf}", f"blk.{{l}}.{gguf}", exact=True)


def _flat(name: str, hf: str, gguf: str) -> Role:
    return Role(name, 1, f"layers.{{l}}.{hf}", f"blk.{{l}}.{gguf}", flat=True)


def _heads(name: str) -> Role:
    return Role(
        name,
        2,
        f"layers.{{l}}.self_attn.{name}_proj.weight",
        f"blk.{{l}}.attn_{name}.weight",
        quantisable=True,
        by_heads=True,
    )


def _of_expert(end: str) -> tuple[str, ...]:
    """Names of a tensor of one expert; the first one is the usual one.

    Those who quantise models take experts apart, also those of families that publish all of a layer in one tensor.
    """
    return tuple(
        f"layers.{{l}}.{block}experts.{{e}}.{end}"
        for block in ("mlp.", "feed_forward.", "block_sparse_moe.", "moe.", "")
    )


def _mlp(name: str, mixtral: str) -> Role:
    return Role(
        name,
        2,
        f"layers.{{l}}.mlp.{name}_proj.weight",
        f"blk.{{l}}.ffn_{name}.weight",
        quantisable=True,
        by_columns=name == "down",
        hf_expert=(
            *_of_expert(f"{name}_proj.weight"),
            f"layers.{{l}}.block_sparse_moe.experts.{{e}}.{mixtral}.weight",
        ),
        hf_stacked=(f"layers.{{l}}.mlp.experts.{name}_proj",),
        gguf_expert=(f"blk.{{l}}.ffn_{name}.{{e}}.weight",),
        gguf_stacked=(f"blk.{{l}}.ffn_{name}_exps.weight",),
    )


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("embed", 2, "embed_tokens.weight", "token_embd.weight"),
        Role("positions", 1, "wpe.weight", "position_embd.weight", flat=True),
        Role("segments", 1, "embeddings.token_type_embeddings.weight", "token_types.weight", flat=True),
        Role("embed_norm", 1, "embeddings.LayerNorm.weight", "token_embd_norm.weight"),
        Role("embed_norm_bias", 1, "embeddings.LayerNorm.bias", "token_embd_norm.bias"),
        _vector("attn_norm", "input_layernorm.weight", "attn_norm.weight"),
        _vector("attn_norm_bias", "input_layernorm.bias", "attn_norm.bias"),
        _matrix("q", "self_attn.q_proj.weight", "attn_q.weight"),
        _matrix("k", "self_attn.k_proj.weight", "attn_k.weight"),
        _matrix("v", "self_attn.v_proj.weight", "attn_v.weight"),
        _vector("q_bias", "self_attn.q_proj.bias", "attn_q.bias"),
        _vector("k_bias", "self_attn.k_proj.bias", "attn_k.bias"),
        _vector("v_bias", "self_attn.v_proj.bias", "attn_v.bias"),
        _flat("q_norm", "self_attn.q_norm.weight", "attn_q_norm.weight"),  # Cohere has one row for each head
        _flat("k_norm", "self_attn.k_norm.weight", "attn_k_norm.weight"),
        _matrix("q_gate", "self_attn.q_gate.weight", "attn_q_gate.weight"),
        _vector("q_gate_bias", "self_attn.q_gate.bias", "attn_q_gate.bias"),
        _matrix("q_a", "self_attn.q_a_proj.weight", "attn_q_a.weight"),
        _vector("q_a_bias", "self_attn.q_a_proj.bias", "attn_q_a.bias"),
        _vector("q_a_norm", "self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"),
        _matrix("q_b", "self_attn.q_b_proj.weight", "attn_q_b.weight"),
        _matrix("kv_a", "self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"),
        _vector("kv_a_bias", "self_attn.kv_a_proj_with_mqa.bias", "attn_kv_a_mqa.bias"),
        _vector("kv_a_norm", "self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
        _matrix("kv_b", "self_attn.kv_b_proj.weight", "attn_kv_b.weight"),  # k_b and v_b, head by head
        _heads("k_b"),
        _heads("v_b"),
        _vector("sinks", "self_attn.sinks", "attn_sinks.weight"),
        _matrix("o", "self_attn.o_proj.weight", "attn_output.weight", by_columns=True),
        _vector("o_bias", "self_attn.o_proj.bias", "attn_output.bias"),
        _vector("attn_post_norm", "post_self_attn_layernorm.weight", "post_attention_norm.weight"),
        _vector("attn_sum_norm", "attn_output_norm.weight", "attn_output_norm.weight"),
        _vector("attn_sum_norm_bias", "attn_output_norm.bias", "attn_output_norm.bias"),
        *(_matrix(f"delta_{x}", f"linear_attn.{x}_proj.weight", f"ssm_{x}.weight") for x in "qkv"),
        _matrix("delta_gate", "linear_attn.in_proj_z.weight", "attn_gate.weight"),
        _exact("delta_beta", "linear_attn.in_proj_b.weight", "ssm_beta.weight"),
        _exact("delta_alpha", "linear_attn.in_proj_a.weight", "ssm_alpha.weight"),
        *(_flat(f"delta_{x}_conv", f"linear_attn.{x}_conv1d.weight", f"ssm_{x}_conv1d.weight") for x in "qkv"),
        _vector("delta_rates", "linear_attn.A_log", "ssm_a"),
        _vector("delta_dt_bias", "linear_attn.dt_bias", "ssm_dt.bias"),
        _vector("delta_norm", "linear_attn.norm.weight", "ssm_norm.weight"),
        _matrix("delta_out", "linear_attn.out_proj.weight", "ssm_out.weight", by_columns=True),
        *(_matrix(f"mamba_{x}", f"mamba.{x}_proj.weight", f"ssm_{x}_proj.weight") for x in ("gate", "x", "b", "c")),
        _exact("mamba_dt", "mamba.dt_proj.weight", "ssm_dt.weight"),
        *(_vector(f"mamba_{x}_bias", f"mamba.{x}_proj.bias", f"ssm_{x}_proj.bias") for x in ("gate", "x", "b", "c")),
        _vector("mamba_dt_proj_bias", "mamba.dt_proj.bias", "ssm_dt_proj.bias"),
        *(_flat(f"mamba_{x}_conv", f"mamba.{x}_conv1d.weight", f"ssm_{x}_conv.weight") for x in "xbc"),
        *(_vector(f"mamba_{x}_conv_bias", f"mamba.{x}_conv1d.bias", f"ssm_{x}_conv.bias") for x in "xbc"),
        _flat("mamba_rates", "mamba.A_log", "ssm_a_rates"),
        _vector("mamba_dt_bias", "mamba.dt_bias", "ssm_dt_bias"),
        _flat("mamba_skip", "mamba.D", "ssm_d"),
        _flat("mamba_norm", "mamba.norm.weight", "ssm_group_norm.weight"),
        _matrix("mamba_out", "mamba.out_proj.weight", "ssm_mamba_out.weight", by_columns=True),
        _vector("mamba_out_bias", "mamba.out_proj.bias", "ssm_out.bias"),
        *(_matrix(f"conv_{x}", f"conv.{x}_proj.weight", f"shortconv.{x}.weight") for x in "bcv"),
        _flat("conv_taps", "conv.conv.weight", "shortconv.conv.weight"),
        _matrix("conv_out", "conv.out_proj.weight", "shortconv.out_proj.weight", by_columns=True),
        *(_vector(f"conv_{x}_bias", f"conv.{x}_proj.bias", f"shortconv.{x}.bias") for x in "bcv"),
        _vector("conv_taps_bias", "conv.conv.bias", "shortconv.conv.bias"),
        _vector("conv_out_bias", "conv.out_proj.bias", "shortconv.out_proj.bias"),
        _vector("ffn_norm", "post_attention_layernorm.weight", "ffn_norm.weight"),
        _vector("ffn_norm_bias", "post_attention_layernorm.bias", "ffn_norm.bias"),
        _vector("ffn_post_norm", "post_mlp_layernorm.weight", "post_ffw_norm.weight"),
        _vector("ffn_sum_norm", "layer_output_norm.weight", "layer_output_norm.weight"),
        _vector("ffn_sum_norm_bias", "layer_output_norm.bias", "layer_output_norm.bias"),
        _vector("layer_scale", "layer_scalar", "layer_output_scale.weight"),
        _exact("router", "mlp.gate.weight", "ffn_gate_inp.weight"),
        _vector("router_bias", "mlp.gate.bias", "ffn_gate_inp.bias"),
        replace(_vector("router_correction", "mlp.gate.e_score_correction_bias", "exp_probs_b.bias"), one_row=True),
        _vector("router_norm", "router.scale", "ffn_gate_inp.scale"),
        _vector("expert_scales", "router.per_expert_scale", "ffn_down_exps.scale"),
        _vector("experts_norm", "mlp.experts_norm.weight", "pre_ffw_norm_2.weight"),
        _vector("experts_post_norm", "mlp.experts_post_norm.weight", "post_ffw_norm_2.weight"),
        _vector("shared_post_norm", "mlp.shared_post_norm.weight", "post_ffw_norm_1.weight"),
        _mlp("gate", "w1"),
        _mlp("up", "w3"),
        _mlp("down", "w2"),
        *(
            Role(
                f"{name}_bias",
                1,
                f"layers.{{l}}.mlp.{name}_proj.bias",
                f"blk.{{l}}.ffn_{name}.bias",
                hf_expert=_of_expert(f"{name}_proj.bias"),
            )
            for name in ("gate", "up", "down")
        ),
        _matrix("shared_gate", "mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight"),
        _matrix("shared_up", "mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight"),
        _matrix("shared_down", "mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight", by_columns=True),
        *(
            _vector(f"shared_{x}_bias", f"mlp.shared_experts.{x}_proj.bias", f"ffn_{x}_shexp.bias")
            for x in ("gate", "up", "down")
        ),
        replace(_exact("shared_router", "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"), one_row=True),
        _matrix("latent_in", "mlp.fc1_latent_proj.weight", "ffn_latent_down.weight"),
        _matrix("latent_out", "mlp.fc2_latent_proj.weight", "ffn_latent_up.weight"),
        _vector("latent_in_bias", "mlp.fc1_latent_proj.bias", "ffn_latent_down.bias"),
        _vector("latent_out_bias", "mlp.fc2_latent_proj.bias", "ffn_latent_up.bias"),
        Role("final_norm", 1, "norm.weight", "output_norm.weight"),
        Role("final_norm_bias", 1, "norm.bias", "output_norm.bias"),
        Role("head", 2, "lm_head.weight", "output.weight", quantisable=True),
        Role("head_bias", 1, "lm_head.bias", "output.bias"),
        Role("classifier", 2, "score.weight", "cls.output.weight"),
        Role("classifier_bias", 1, "score.bias", "cls.output.bias"),
        Role("pooler", 2, "pooler.dense.weight", "cls.weight"),
        Role("pooler_bias", 1, "pooler.dense.bias", "cls.bias"),
        Role("pooler_norm", 1, "pooler.norm.weight", "cls.norm.weight"),
        Role("pooler_norm_bias", 1, "pooler.norm.bias", "cls.norm.bias"),
        *(Role(f"dense_{number}", 2, f"dense_{number}.weight", f"dense_{number}.weight") for number in (2, 3)),
    )
}  # fmt: skip

# What a model's last hidden states are given to: each is read by the models that have that task alone.
_POOLED = ("classifier", "pooler", "pooler_norm")
TASK_ROLES = frozenset(
    {"head", "head_bias", "dense_2", "dense_3", *_POOLED, *(f"{role}_bias" for role in _POOLED)}
)


def hf_name(key: Key) -> str:
    """Return the usual name of a tensor in a Hugging Face checkpoint."""
    role = ROLES[key.role]
    name = role.hf if key.expert < 0 else role.hf_expert[0]
    return ("" if key.role in TASK_ROLES else "model.") + name.format(l=key.layer, e=key.expert)


def hf_name_of_experts(key: Key) -> str:
    """Return the name of all experts of a layer, with a star for the expert's number."""
    return hf_name(key._replace(expert=0)).replace(".experts.0.", ".experts.*.")
