"""DeepSeek V2, V3, R1, V3.1, Kimi K2, GLM-4.7-Flash: latent attention, and experts in groups beside shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from mpillm.kernels.types import Activation
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    Sizes,
    model,
    read_activation,
    read_norm,
    read_rotary,
    read_width,
)
from mpillm.model.families.routed import OF_EXPERTS, read_routed_experts
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec
from mpillm.model.layers.latent import LatentAttentionSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, usual_config

_V2, _V3, _LITE = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"
_YOUTU = "YoutuForCausalLM"
_LATENTS = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
_SIGMOID = 2  # a value of a GGUF file's expert_gating_func


class DeepSeek(Family):
    """V2's router is a softmax, and the best expert of a group is its score; all others are sigmoids with a correction.

    The norms of latents have an epsilon of their own, which no configuration says.
    """

    architectures = {_V2: "deepseek_v2", _V3: "deepseek_v3", _LITE: "glm4_moe_lite"}
    model_types: ClassVar[Mapping[str, str]] = {"kimi_k2": _V3}
    gguf: ClassVar[tuple[str, ...]] = ("deepseek2",)
    yarn_multiplies_scores = True
    defaults = {
        _V2: {
            **_LATENTS,
            "v_head_dim": 128,
            "max_position_embeddings": 2048,
            "first_k_dense_replace": 0,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "moe_intermediate_size": 1407,
            "topk_method": "greedy",
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _V3: {
            **_LATENTS,
            "v_head_dim": 128,
            "max_position_embeddings": 4096,
            "first_k_dense_replace": 3,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "topk_group": 4,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        _LITE: {
            **_LATENTS,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "max_position_embeddings": 202752,
            "rms_norm_eps": 1e-5,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1536,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.8,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = latent_sizes(fields), read_width(fields), read_norm(fields)
        interleaved = architecture == _V2 or fields.flag("rope_interleave", default=True)
        attention = latent_attention(fields, sizes, interleaved)
        bias, dense = (
            architecture == _V2 and fields.flag("mlp_bias"),
            _dense(fields, architecture, sizes.n_layers),
        )
        mlp, experts = MlpSpec(width, activation, bias=bias), None
        if not all(dense):
            experts = _experts(fields, architecture, activation)
            if bias and experts.shared:
                experts = replace(experts, shared=replace(experts.shared, bias=True))
        fields.read |= OF_EXPERTS
        for key in (
            "num_mtp_layers",
            "ep_size",
            "seq_aux",
            "aux_loss_alpha",
            "qk_head_dim",
        ):
            fields.raw(key)

        def layer(number: int) -> LayerSpec:
            return LayerSpec(
                attention, experts if experts and not dense[number] else mlp, Norms(norm), Norms(norm)
            )

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        """Files with k_b and v_b have the lengths of heads in fields of their own, others in the usual ones."""
        split = fields.raw("attention.key_length_mla") is not None
        key, value = (
            fields.integer(f"attention.{name}_length{'_mla' if split else ''}") for name in ("key", "value")
        )
        fields.read |= {"attention.key_length", "attention.value_length", "attention.head_count_kv"}
        rotary = fields.integer("rope.dimension_count")
        sigmoid = fields.integer("expert_gating_func", 0) == _SIGMOID
        groups = fields.integer("expert_group_count", 0) or 1
        config = usual_config(fields, shape_of, head_dim=key)
        dense = fields.integer("leading_dense_block_count", 0)
        count = fields.integer("expert_count", 0)
        return config | {
            "architectures": [_V3 if sigmoid else _V2],
            "model_type": self.architectures[_V3 if sigmoid else _V2],
            "num_key_value_heads": config["num_attention_heads"],
            "head_dim": rotary,
            "kv_lora_rank": fields.integer("attention.kv_lora_rank"),
            "q_lora_rank": fields.integer("attention.q_lora_rank", 0) or None,
            "qk_nope_head_dim": key - rotary,
            "qk_rope_head_dim": rotary,
            "v_head_dim": value,
            "first_k_dense_replace": dense if count else config["num_hidden_layers"],
            "n_routed_experts": count or 1,
            "num_experts_per_tok": fields.integer("expert_used_count", 0) or 1,
            "moe_intermediate_size": fields.integer("expert_feed_forward_length", 0) or config["intermediate_size"],
            "n_shared_experts": fields.integer("expert_shared_count", 0),
            "n_group": groups,
            "topk_group": fields.integer("expert_group_used_count", 0) or 1,
            "routed_scaling_factor": fields.number("expert_weights_scale", 0.0) or 1.0,
            "norm_topk_prob": fields.raw("expert_weights_norm") is True,
        } | ({} if sigmoid else {"topk_method": "greedy" if groups == 1 else "group_limited_greedy"})  # fmt: skip


class Youtu(DeepSeek):
    """Latent attention and a dense MLP in all layers."""

    architectures = {_YOUTU: "youtu"}
    model_types = {}
    gguf = ()
    tied = True
    defaults = {
        _YOUTU: {
            **_LATENTS,
            "v_head_dim": 128,
            "max_position_embeddings": 131072,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        }
    }


def latent_sizes(fields: Fields) -> Sizes:
    """Return the sizes; `head_dim` is that of the part of a head that turns, as transformers has it."""
    heads = fields.integer("num_attention_heads", 1, 2**16)
    if fields.integer("num_key_value_heads", 1, 2**16, default=heads) != heads:
        raise fields.fail("num_key_value_heads", f"but latents are expanded for each of the {heads} heads")
    fields.raw("head_dim")
    rotary = fields.integer("qk_rope_head_dim", 2, 2**16)
    if rotary % 2:
        raise fields.fail("qk_rope_head_dim", "but rope needs an even number of dimensions")
    return Sizes(
        fields.integer("num_hidden_layers", 1, 4096),
        fields.integer("hidden_size", 1, 2**20),
        heads,
        heads,
        rotary,
        fields.integer("max_position_embeddings", 1, LONGEST),
        fields.integer("vocab_size", 1, 2**24),
    )


def latent_attention(fields: Fields, sizes: Sizes, interleaved: bool) -> LatentAttentionSpec:
    """Latent attention, with RoPE of neighbouring dimensions or of halves."""
    rotary = read_rotary(fields, sizes, interleaved=interleaved)
    key_dim = fields.integer("qk_nope_head_dim", 1, 2**16)
    q_rank = fields.optional_integer("q_lora_rank", 1, 2**20) or 0
    norm = NormSpec(1e-6)
    return LatentAttentionSpec(
        sizes.n_heads,
        key_dim,
        fields.integer("v_head_dim", 1, 2**16, default=sizes.hidden // sizes.n_heads),
        fields.integer("kv_lora_rank", 1, 2**11 - sizes.head_dim),
        (key_dim + sizes.head_dim) ** -0.5 * rotary.config.score_factor,
        rotary,
        norm,
        q_rank,
        norm if q_rank else None,
        bias=fields.flag("attention_bias"),
    )


def _dense(fields: Fields, architecture: str, n_layers: int) -> list[bool]:
    """Return the layers that have one MLP instead of experts."""
    if architecture == _YOUTU:
        return [True] * n_layers
    if architecture != _LITE:
        first = fields.integer("first_k_dense_replace", 0, LONGEST)
        return [layer < first for layer in range(n_layers)]
    fields.raw("first_k_dense_replace")  # published files have it, and transformers does not look at it
    kinds = fields.raw("mlp_layer_types")
    if kinds is None:
        return [layer == 0 for layer in range(n_layers)]
    if not isinstance(kinds, list) or len(kinds) < n_layers or set(map(str, kinds)) - {"dense", "sparse"}:
        raise fields.fail("mlp_layer_types", f"but must be a list of {n_layers} words, dense or sparse")
    return [kind == "dense" for kind in kinds[:n_layers]]


def _experts(fields: Fields, architecture: str, activation: Activation) -> ExpertsSpec:
    if architecture != _V2:
        if fields.raw("scoring_func") not in (None, "sigmoid"):
            raise fields.fail("scoring_func", f"but {architecture} has sigmoid")
        if fields.raw("topk_method") not in (None, "noaux_tc"):
            raise fields.fail("topk_method", f"but {architecture} has noaux_tc")
        return read_routed_experts(fields, activation)
    if fields.raw("scoring_func") not in (None, "softmax"):
        raise fields.fail("scoring_func", f"but {architecture} has softmax")
    method = fields.one_of("topk_method", ("greedy", "group_limited_greedy"), default="greedy")
    if method == "greedy" and fields.values.get("n_group") not in (None, 1):
        fields = Fields({**fields.values, "n_group": 1, "topk_group": 1}, fields.name, fields.defaults)
    # transformers does not look at norm_topk_prob
    return read_routed_experts(
        fields, activation, scoring="softmax", correction=False, group_best=1, normalise=False
    )
