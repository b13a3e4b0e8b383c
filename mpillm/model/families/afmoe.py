"""AFMoE (Trinity): gated attention with windows in most layers, and experts that a sigmoid chooses."""

from __future__ import annotations

from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.families.layer_types import FULL, SLIDING, every_nth_full, read_layer_types
from mpillm.model.families.routed import read_routed_experts
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_gating,
    routed_config,
    usual_config,
    window_types,
)
from mpillm.weights.names import Names

_AFMOE = "AfmoeForCausalLM"
_ROUTED = {
    "first_k_dense_replace": "num_dense_layers",
    "n_shared_experts": "num_shared_experts",
    "n_routed_experts": "num_experts",
    "routed_scaling_factor": "route_scale",
    "norm_topk_prob": "route_norm",
}


class Afmoe(Family):
    """Norms before and after attention and MLP; RoPE is of layers with a window alone."""

    architectures = {_AFMOE: "afmoe"}
    gguf = ("afmoe",)
    names = Names(
        hf={
            "layers.{l}.self_attn.gate_proj.weight": ("q_gate",),
            "layers.{l}.post_attention_layernorm.weight": ("attn_post_norm",),
            "layers.{l}.pre_mlp_layernorm.weight": ("ffn_norm",),
            "layers.{l}.mlp.router.gate.weight": ("router",),
            "layers.{l}.mlp.expert_bias": ("router_correction",),
        },
        gguf={"blk.{l}.attn_gate.weight": ("q_gate",)},
    )
    defaults = {
        _AFMOE: {
            "head_dim": 128,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            "sliding_window": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias = fields.flag("attention_bias")
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        every = fields.integer("global_attn_every_n_layers", 1, LONGEST, default=4)
        types = read_layer_types(fields, sizes.n_layers, FULL, SLIDING) or every_nth_full(
            sizes.n_layers, every
        )
        dense = MlpSpec(width, activation)
        fields.one_of("score_func", ("sigmoid",), default="sigmoid")
        experts = read_routed_experts(
            fields,
            activation,
            shared=2,
            shared_key="num_shared_experts",
            scale_key="route_scale",
            normalise=True,
        )
        fields.raw("route_norm")  # transformers always divides
        first = fields.integer("num_dense_layers", 0, LONGEST, default=1)
        rotary = read_rotary(fields, sizes)
        norms = Norms(norm, norm)

        def layer(number: int) -> LayerSpec:
            slides = types[number] == SLIDING
            attention = attention_of(
                sizes,
                rotary if slides else None,
                window if slides else 0,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm=norm,
                gate=True,
            )
            return LayerSpec(attention, dense if number < first else experts, norms, norms)

        scale = sizes.hidden**0.5 if fields.flag("mup_enabled") else 1.0
        return model(fields, architecture, sizes, layer, norm, embedding_scale=scale)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        """llama.cpp multiplies embeddings by the root of their length in all of them."""
        refuse_gating(fields)
        config = usual_config(fields, shape_of)
        return config | {
            "architectures": [_AFMOE],
            "sliding_window": fields.integer("attention.sliding_window", 0) or None,
            "layer_types": window_types(fields, config["num_hidden_layers"], 4),
            "mup_enabled": True,
            **routed_config(fields, _ROUTED),
        }
