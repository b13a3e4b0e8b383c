"""EXAONE 4: norms only after attention and MLP, norms of each head's q and k, and windows in most layers; K-EXAONE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    Sizes,
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
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_gating,
    routed_config,
    usual_config,
    window_types,
)
from mpillm.weights.names import AFTER_NORMS, Names

_MIXTURE = "ExaoneMoeForCausalLM"
_ROUTED = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}


class Exaone(Family):
    """If some layers have a window, those without one have no RoPE."""

    architectures = {"Exaone4ForCausalLM": "exaone4"}
    gguf = ("exaone4",)
    names = Names(hf=AFTER_NORMS)
    defaults = {
        "Exaone4ForCausalLM": {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        attention = _attention(fields, sizes, norm)

        def layer(number: int) -> LayerSpec:
            mlp, norms = MlpSpec(width, activation), Norms(after=norm)
            return LayerSpec(attention[number], mlp, norms, norms)

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        config = usual_config(fields, shape_of)
        return config | {
            "architectures": ["Exaone4ForCausalLM"],
            "sliding_window": fields.integer("attention.sliding_window", 0) or None,
            "layer_types": window_types(fields, config["num_hidden_layers"], 4),
        }


class ExaoneMixture(Family):
    """K-EXAONE: EXAONE 4's attention with norms before it and before DeepSeek V3's experts."""

    architectures = {_MIXTURE: "exaone_moe"}
    gguf = ("exaone-moe",)
    names = Names(hf={"layers.{l}.mlp.e_score_correction_bias": ("router_correction",)})
    defaults = {
        _MIXTURE: {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1024,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "bos_token_id": 1,
            "eos_token_id": 53,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        attention = _attention(fields, sizes, norm)
        dense = MlpSpec(width, activation)
        experts = read_routed_experts(fields, activation, shared_key="num_shared_experts")
        first = fields.integer("first_k_dense_replace", 0, LONGEST, default=1)
        kinds = read_layer_types(fields, sizes.n_layers, "dense", "sparse", key="mlp_layer_types")
        kinds = kinds or ["dense" if number < first else "sparse" for number in range(sizes.n_layers)]

        def layer(number: int) -> LayerSpec:
            mlp = dense if kinds[number] == "dense" else experts
            return LayerSpec(attention[number], mlp, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_gating(fields)
        config = usual_config(fields, shape_of)
        fields.raw("expert_shared_feed_forward_length")  # their number times the width
        return config | {
            "architectures": [_MIXTURE],
            "sliding_window": fields.integer("attention.sliding_window", 0) or None,
            "layer_types": window_types(fields, config["num_hidden_layers"], 4),
            **routed_config(fields, _ROUTED),
        }


def _attention(fields: Fields, sizes: Sizes, norm: NormSpec) -> list[AttentionSpec]:
    """Return the RoPE of each layer. If some layers have a window, those without one have no RoPE."""
    window, rotary = fields.optional_integer("sliding_window", 1, LONGEST) or 0, read_rotary(fields, sizes)
    return [
        attention_of(sizes, rotary, window, qk_norm=norm)
        if kind == SLIDING
        else attention_of(sizes, None if window else rotary, qk_norm=norm)
        for kind in _layer_types(fields, sizes.n_layers, window)
    ]


def _layer_types(fields: Fields, n_layers: int, window: int) -> Sequence[str]:
    """Return each layer's type; without layer_types sliding_window_pattern says that every n-th layer has no window."""
    types = read_layer_types(fields, n_layers, FULL, SLIDING)
    if not window or types is not None:
        fields.raw("sliding_window_pattern")
    if not window:
        return [FULL] * n_layers
    if types is not None:
        return types
    every = fields.integer("sliding_window_pattern", 1, LONGEST, default=4)
    return every_nth_full(n_layers, every)
