"""gpt-oss: attention sinks, a window in every second layer, and experts with biases and a clamped SwiGLU."""

from __future__ import annotations

from typing import Any

from mpillm.kernels.types import Activation
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    model,
    read_chosen,
    read_expert_count,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.families.layer_types import read_layer_types
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, usual_config
from mpillm.weights.names import Names

_GPT_OSS = "GptOssForCausalLM"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(Family):
    """Experts are published in MXFP4, or as floats that lie transposed; gate and up alternate row by row."""

    architectures = {_GPT_OSS: "gpt_oss"}
    gguf = ("gpt-oss",)
    names = Names(
        hf={
            "layers.{l}.mlp.router.weight": ("router",),
            "layers.{l}.mlp.router.bias": ("router_bias",),
        },
        hf_in_turn={
            "layers.{l}.mlp.experts.gate_up_proj": ("gate", "up"),
            "layers.{l}.mlp.experts.gate_up_proj_bias": ("gate_bias", "up_bias"),
            "layers.{l}.mlp.experts.down_proj": ("down",),
            "layers.{l}.mlp.experts.down_proj_bias": ("down_bias",),
        },
        gguf={"blk.{l}.post_attention_norm.weight": ("ffn_norm",)},
        gguf_stacked={
            "blk.{l}.ffn_gate_exps.bias": ("gate_bias",),
            "blk.{l}.ffn_up_exps.bias": ("up_bias",),
            "blk.{l}.ffn_down_exps.bias": ("down_bias",),
        },
    )
    defaults = {
        _GPT_OSS: {
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "sliding_window": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "rope_theta": 150000.0,
            "rope_parameters": _YARN,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        fields.one_of("hidden_act", ("silu",), default="silu")
        sizes, width = read_sizes(fields), read_width(fields)
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        types = read_layer_types(fields, sizes.n_layers, _FULL, _SLIDING)
        if types is None:
            types = [_FULL if layer % 2 else _SLIDING for layer in range(sizes.n_layers)]
        if "rope_scaling" in fields.values:
            fields.defaults = {
                key: value for key, value in fields.defaults.items() if key != "rope_parameters"
            }
        norm, rotary = read_norm(fields, default=1e-5), read_rotary(fields, sizes)
        bias = fields.flag("attention_bias", default=True)
        count = read_expert_count(fields)
        fields.raw("experts_per_token")  # another name of num_experts_per_tok, in published files
        fields.raw("initial_context_length")  # the original context length, which yarn's table has too
        experts = ExpertsSpec(
            count,
            width,
            RouterSpec(read_chosen(fields, count), bias=True),
            Activation.SWIGLU_CLAMPED,
            bias=True,
            limit=fields.number("swiglu_limit", 1e-6, 1e6, default=7.0),
            alpha=fields.number("swiglu_alpha", 1e-6, 1e6, default=1.702),
        )

        def layer(number: int) -> LayerSpec:
            attention = AttentionSpec(
                sizes.n_heads,
                sizes.n_kv_heads,
                sizes.head_dim,
                sizes.head_dim**-0.5,
                rotary,
                window if types[number] == _SLIDING else 0,
                qkv_bias=bias,
                o_bias=bias,
                sinks=True,
            )
            return LayerSpec(attention, experts, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        config = usual_config(fields, shape_of)
        width = fields.integer("expert_feed_forward_length", 0) or config["intermediate_size"]
        if fields.raw("rope.scaling.type") == "yarn":
            config["rope_parameters"] = {"truncate": False}
        return config | {
            "architectures": [_GPT_OSS],
            "model_type": "gpt_oss",
            "intermediate_size": width,
            "sliding_window": fields.integer("attention.sliding_window"),
            "num_local_experts": fields.integer("expert_count"),
            "num_experts_per_tok": fields.integer("expert_used_count"),
        }
