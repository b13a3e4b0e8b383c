"""LFM2 (Liquid AI): gated short convolutions in most layers, attention in the others; dense, or with experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpillm.errors import ModelError
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    attention_of,
    model,
    read_chosen,
    read_expert_count,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.families.layer_types import FULL, read_layer_types
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.short_conv import ShortConvSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, refuse_experts, usual_config
from mpillm.weights.names import Names
from mpillm.weights.roles import Key

_DENSE, _MIXTURE = "Lfm2ForCausalLM", "Lfm2MoeForCausalLM"
_CONV = "conv"
_INPUTS = "conv_b", "conv_c", "conv_v"
_USUAL = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "rope_theta": 1e6,
    "conv_L_cache": 3,
    **SMALL_BOS,
}


class Lfm2(Family):
    """The width of a dense model's MLPs is two thirds of what the configuration says, rounded up."""

    architectures = {_DENSE: "lfm2", _MIXTURE: "lfm2_moe"}
    gguf = ("lfm2", "lfm2moe")
    names = Names(
        hf={
            "layers.{l}.operator_norm.weight": ("attn_norm",),
            "layers.{l}.ffn_norm.weight": ("ffn_norm",),
            "layers.{l}.self_attn.out_proj.weight": ("o",),
            "layers.{l}.self_attn.q_layernorm.weight": ("q_norm",),
            "layers.{l}.self_attn.k_layernorm.weight": ("k_norm",),
            "layers.{l}.conv.in_proj.weight": _INPUTS,
            "layers.{l}.conv.in_proj.bias": tuple(f"{role}_bias" for role in _INPUTS),
            "layers.{l}.feed_forward.w1.weight": ("gate",),
            "layers.{l}.feed_forward.w3.weight": ("up",),
            "layers.{l}.feed_forward.w2.weight": ("down",),
            "layers.{l}.feed_forward.experts.{e}.w1.weight": ("gate",),
            "layers.{l}.feed_forward.experts.{e}.w3.weight": ("up",),
            "layers.{l}.feed_forward.experts.{e}.w2.weight": ("down",),
            "layers.{l}.feed_forward.gate.weight": ("router",),
            "layers.{l}.feed_forward.expert_bias": ("router_correction",),
            "embedding_norm.weight": ("final_norm",),
        },
        gguf={
            "blk.{l}.shortconv.in_proj.weight": _INPUTS,
            "token_embd_norm.weight": ("final_norm",),
        },
    )
    tied = True
    defaults = {
        _DENSE: {**_USUAL, "block_multiple_of": 256},
        _MIXTURE: {
            **_USUAL,
            "num_dense_layers": 2,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "use_expert_bias": True,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        sizes, norm = read_sizes(fields), read_norm(fields, "norm_eps", 1e-5)
        fields.raw("tie_embedding")  # the tensors say so
        attention = attention_of(sizes, read_rotary(fields, sizes), qk_norm=norm)
        conv = ShortConvSpec(sizes.hidden, fields.integer("conv_L_cache", 1, 2**10), fields.flag("conv_bias"))
        types = _layer_types(fields, sizes.n_layers)
        mlp: MlpSpec | ExpertsSpec
        if architecture == _DENSE:
            mlp, dense, n_dense = MlpSpec(_width(fields)), None, 0
        else:
            mlp, dense = _experts(fields), MlpSpec(read_width(fields))
            n_dense = fields.integer("num_dense_layers", 0, 4096)

        def layer(number: int) -> LayerSpec:
            mixer = conv if types[number] == _CONV else attention
            part = dense if dense and number < n_dense else mlp
            return LayerSpec(mixer, part, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        config = usual_config(fields, shape_of, eps=("layer_norm_rms_epsilon", "norm_eps"))
        layers = range(min(max(config["num_hidden_layers"], 0), 4096))
        dense = fields.kind == "lfm2"
        config.pop("hidden_act")
        config |= {
            "architectures": [_DENSE if dense else _MIXTURE],
            "conv_L_cache": fields.integer("shortconv.l_cache"),
            "layer_types": [
                _CONV if shape_of(Key("conv_taps", layer)) is not None else FULL for layer in layers
            ],
        }
        if dense:
            refuse_experts(fields)
            return config | {"block_auto_adjust_ff_dim": False}
        if fields.integer("expert_gating_func", 2) != 2:
            raise ModelError(
                f"{fields.path}: only experts that a sigmoid chooses are supported in lfm2moe files."
            )
        return config | {
            "num_experts": fields.integer("expert_count"),
            "num_experts_per_tok": fields.integer("expert_used_count"),
            "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
            "num_dense_layers": fields.integer("leading_dense_block_count", 0),
            "use_expert_bias": any(shape_of(Key("router_correction", layer)) is not None for layer in layers),
        }


def _layer_types(fields: Fields, n_layers: int) -> Sequence[str]:
    """Return the kind of each layer, or what the numbers of those with attention say."""
    attending = fields.integers("full_attn_idxs", 0, 4096)
    types = read_layer_types(fields, n_layers, _CONV, FULL)
    if types is not None:
        return types
    if fields.values.get("full_attn_idxs") is None:
        return [FULL] * n_layers
    return [FULL if layer in attending else _CONV for layer in range(n_layers)]


def _width(fields: Fields) -> int:
    """Return the inner columns of a dense model's MLPs."""
    width = read_width(fields, "block_ff_dim" if "block_ff_dim" in fields.values else "intermediate_size")
    fields.raw("intermediate_size")
    unit = fields.integer("block_multiple_of", 1, 2**20)
    multiplier = fields.raw("block_ffn_dim_multiplier")
    if not fields.flag("block_auto_adjust_ff_dim", default=True):
        return width
    width = int(2 * width / 3)
    if multiplier is None and "block_ffn_dim_multiplier" in fields.values:
        return width
    factor = fields.number("block_ffn_dim_multiplier", 1e-3, 1e3, default=1.0)
    return -(-int(factor * width) // unit) * unit


def _experts(fields: Fields) -> ExpertsSpec:
    count = read_expert_count(fields)
    router = RouterSpec(
        read_chosen(fields, count),
        scoring="sigmoid",
        normalise=fields.flag("norm_topk_prob"),
        scale=fields.number("routed_scaling_factor", 0, 1e9, default=1.0),
        correction=fields.flag("use_expert_bias"),
    )
    return ExpertsSpec(count, read_width(fields, "moe_intermediate_size"), router)
