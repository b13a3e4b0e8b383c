"""Qwen3-Next and Qwen 3.5: gated DeltaNet in most layers, gated attention in the others; dense, or with experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    model,
    read_chosen,
    read_expert_count,
    read_norm,
    read_partial_rotary,
    read_sizes,
    read_width,
    require_silu,
)
from mpillm.model.families.layer_types import read_layer_types
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.gated_delta import GatedDeltaSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, refuse_experts, usual_config
from mpillm.weights.names import Names, RowGroups
from mpillm.weights.roles import Key

_NEXT = "Qwen3NextForCausalLM"
_DENSE, _MIXTURE = "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"
_LINEAR, _FULL = "linear_attention", "full_attention"

_Q, _Q_BIAS = ("q", "q_gate"), ("q_bias", "q_gate_bias")
_QKV, _CONVS = (
    ("delta_q", "delta_k", "delta_v"),
    ("delta_q_conv", "delta_k_conv", "delta_v_conv"),
)
_QKVZ, _BA = (*_QKV, "delta_gate"), ("delta_beta", "delta_alpha")

_USUAL = {
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_DENSE_USUAL = {**_USUAL, "num_key_value_heads": 4}
_MIXTURE_USUAL = {
    **_USUAL,
    "num_key_value_heads": 2,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
}


class QwenNext(Family):
    """The query projection has a gate for each head; weights of norms are stored minus one, but not of DeltaNet's.

    Files of llama.cpp's converter differ: norms are stored as they are, DeltaNet's rates are not logarithms, and in
    Qwen 3.5 its value heads lie one of each key head after the other. The key "gguf_weights" says so.
    """

    architectures = {
        _NEXT: "qwen3_next",
        _DENSE: "qwen3_5_text",
        _MIXTURE: "qwen3_5_moe_text",
    }
    model_types = {"qwen3_5": _DENSE, "qwen3_5_moe": _MIXTURE}
    gguf = ("qwen3next", "qwen35", "qwen35moe")
    names = Names(
        hf={
            "layers.{l}.self_attn.q_proj.weight": _Q,
            "layers.{l}.self_attn.q_proj.bias": _Q_BIAS,
            "layers.{l}.linear_attn.in_proj_qkvz.weight": _QKVZ,
            "layers.{l}.linear_attn.in_proj_ba.weight": _BA,
            "layers.{l}.linear_attn.in_proj_qkv.weight": _QKV,
            "layers.{l}.linear_attn.conv1d.weight": _CONVS,
            "layers.{l}.mlp.shared_expert.gate_proj.weight": ("shared_gate",),
            "layers.{l}.mlp.shared_expert.up_proj.weight": ("shared_up",),
            "layers.{l}.mlp.shared_expert.down_proj.weight": ("shared_down",),
        },
        gguf={
            "blk.{l}.attn_q.weight": _Q,
            "blk.{l}.attn_qkv.weight": _QKV,
            "blk.{l}.ssm_in.weight": _QKVZ,
            "blk.{l}.ssm_ba.weight": _BA,
            "blk.{l}.ssm_conv1d.weight": _CONVS,
            "blk.{l}.post_attention_norm.weight": ("ffn_norm",),
        },
    )
    defaults = {
        _NEXT: {**_MIXTURE_USUAL, "num_local_experts": 512, "num_experts_per_tok": 10},
        _DENSE: _DENSE_USUAL,
        _MIXTURE: _MIXTURE_USUAL,
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        require_silu(fields)
        sizes, converted = read_sizes(fields), fields.flag("gguf_weights")
        norm = read_norm(fields, offset=0.0 if converted else 1.0)
        _refuse(fields)
        bias = fields.flag("attention_bias")
        attention = AttentionSpec(
            sizes.n_heads,
            sizes.n_kv_heads,
            sizes.head_dim,
            sizes.head_dim**-0.5,
            read_partial_rotary(fields, sizes, default=0.25),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=norm,
            gate=True,
            gate_bias=bias,
        )
        delta = _delta(fields, norm.eps, converted, architecture)
        types, mlp = _layer_types(fields, sizes.n_layers), _mlps(fields, architecture, sizes.n_layers)

        def layer(number: int) -> LayerSpec:
            mixer = delta if types[number] == _LINEAR else attention
            return LayerSpec(mixer, mlp(number), Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        def size(key: str) -> int:
            value = config.get(key, _USUAL.get(key))
            return value if type(value) is int and value > 0 else 1

        keys, heads = size("linear_num_key_heads"), size("linear_num_value_heads")
        dk, dv, share = (
            size("linear_key_head_dim"),
            size("linear_value_head_dim"),
            max(heads // keys, 1),
        )
        whole = keys * dk, keys * dk, heads * dv
        return {
            _Q: (size("head_dim"),) * 2,
            _Q_BIAS: (size("head_dim"),) * 2,
            _QKVZ: (dk, dk, share * dv, share * dv),
            _BA: (share, share),
            _QKV: whole,
            _CONVS: whole,
        }

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        architecture = dict(zip(self.gguf, (_NEXT, _DENSE, _MIXTURE), strict=True))[fields.kind]
        config = usual_config(fields, shape_of, partial=True)
        layers = range(min(max(config["num_hidden_layers"], 0), 4096))
        for known in ("full_attention_interval", "attention.recurrent_layers", "rope.dimension_sections"):
            fields.raw(known)
        heads = fields.integer("ssm.time_step_rank")
        config |= {
            "architectures": [architecture],
            "model_type": self.architectures[architecture],
            "gguf_weights": True,
            "layer_types": [
                _LINEAR if shape_of(Key("delta_rates", layer)) is not None else _FULL for layer in layers
            ],
            "linear_conv_kernel_dim": fields.integer("ssm.conv_kernel"),
            "linear_key_head_dim": fields.integer("ssm.state_size"),
            "linear_num_key_heads": fields.integer("ssm.group_count"),
            "linear_num_value_heads": heads,
            "linear_value_head_dim": fields.integer("ssm.inner_size") // max(heads, 1),
        }
        if architecture == _DENSE:
            refuse_experts(fields)
            return config
        config |= {
            "num_experts": fields.integer("expert_count"),
            "num_experts_per_tok": fields.integer("expert_used_count"),
            "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
            "shared_expert_intermediate_size": fields.integer("expert_shared_feed_forward_length"),
        }
        if architecture == _MIXTURE:
            config.pop("intermediate_size")
            return config
        # llama.cpp always normalises the weights of experts, for this architecture.
        normalise = fields.raw("expert_weights_norm") is not False
        dense = [layer for layer in layers if shape_of(Key("router", layer)) is None]
        return config | {"norm_topk_prob": normalise, "mlp_only_layers": dense}


def _refuse(fields: Fields) -> None:
    """Raise ModelError for what no published model of the family has."""
    if fields.raw("attn_output_gate") not in (None, True):
        raise fields.fail("attn_output_gate", "but only attention with a gate is supported")
    for key in ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
        # These keys change nothing here: the type of other programs' states, and layers that predict further tokens.
        fields.raw(key)


def _delta(fields: Fields, eps: float, converted: bool, architecture: str) -> GatedDeltaSpec:
    n_keys = fields.integer("linear_num_key_heads", 1, 2**16)
    n_heads = fields.integer("linear_num_value_heads", 1, 2**16)
    if n_heads % n_keys:
        raise fields.fail(
            "linear_num_value_heads", f"but must be a multiple of linear_num_key_heads ({n_keys})"
        )
    return GatedDeltaSpec(
        n_keys,
        n_heads,
        fields.integer("linear_key_head_dim", 1, 2**16),
        fields.integer("linear_value_head_dim", 1, 2**16),
        fields.integer("linear_conv_kernel_dim", 1, 2**10),
        NormSpec(eps),
        tiled=converted and architecture != _NEXT and n_heads != n_keys,
        log_rates=not converted,
    )


def _layer_types(fields: Fields, n_layers: int) -> Sequence[str]:
    every = fields.integer("full_attention_interval", 1, LONGEST, default=4)
    types = read_layer_types(fields, n_layers, _LINEAR, _FULL)
    if types is None:
        return [_LINEAR if (layer + 1) % every else _FULL for layer in range(n_layers)]
    return types


def _mlps(fields: Fields, architecture: str, n_layers: int) -> Callable[[int], MlpSpec | ExpertsSpec]:
    """Return the feed-forward part of each layer."""
    if architecture == _DENSE:
        dense = MlpSpec(read_width(fields))
        return lambda layer: dense
    count = read_expert_count(fields)
    experts = ExpertsSpec(
        count,
        read_width(fields, "moe_intermediate_size"),
        RouterSpec(read_chosen(fields, count), normalise=fields.flag("norm_topk_prob")),
        shared=MlpSpec(read_width(fields, "shared_expert_intermediate_size"), prefix="shared_"),
        shared_router=True,
    )
    if architecture != _NEXT:
        return lambda layer: experts
    step = fields.integer("decoder_sparse_step", 1, LONGEST, default=1)
    without = fields.integers("mlp_only_layers", 0, LONGEST)
    has_experts = [layer not in without and (layer + 1) % step == 0 for layer in range(n_layers)]
    if all(has_experts):
        fields.read.add("intermediate_size")
        return lambda layer: experts
    mlp = MlpSpec(read_width(fields))
    return lambda layer: experts if has_experts[layer] else mlp
