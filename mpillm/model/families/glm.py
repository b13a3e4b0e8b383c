"""GLM-4 (dense), and GLM-4.5 and later with experts: RoPE of a part of each head."""

from __future__ import annotations

from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_partial_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.families.routed import read_routed_experts
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_gating,
    refuse_window,
    routed_config,
    usual_config,
)
from mpillm.weights.names import Names
from mpillm.weights.roles import Key

_FIRST, _DENSE, _MIXTURE = "GlmForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM"
_SOLAR = "SolarOpenForCausalLM"
_USUAL = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
}


class Glm(Family):
    """RoPE of neighbouring dimensions, and norms before attention and MLP; from GLM-4-0414 on after them as well."""

    architectures = {_FIRST: "glm", _DENSE: "glm4"}
    model_types = {"glm4v_text": _DENSE}
    gguf = ("glm4", "chatglm")
    names = Names(
        hf={"layers.{l}.mlp.gate_up_proj.weight": ("gate", "up")},
        gguf={"blk.{l}.ffn_up.weight": ("gate", "up")},
    )
    defaults = {_FIRST: _USUAL, _DENSE: _USUAL}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        attention = attention_of(
            sizes,
            read_partial_rotary(fields, sizes, default=0.5, interleaved=True),
            qkv_bias=fields.flag("attention_bias"),
        )
        norms = Norms(norm, norm) if architecture == _DENSE else Norms(norm)
        layer = LayerSpec(attention, MlpSpec(width, activation), norms, norms)
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        refuse_window(fields)
        return usual_config(fields, shape_of, partial=True) | {
            "architectures": [_DENSE if fields.kind == "glm4" else _FIRST],
            "attention_bias": shape_of(Key("q_bias", 0)) is not None,
        }


class GlmMixture(Family):
    """RoPE of halves, and a router that is a sigmoid with a correction and has groups.

    Solar Open has experts in all layers.
    """

    architectures = {_MIXTURE: "glm4_moe", _SOLAR: "solar_open"}
    model_types = {"glm4v_moe_text": _MIXTURE}
    gguf = ("glm4moe",)
    names = Names(gguf={"blk.{l}.post_attention_norm.weight": ("ffn_norm",)})
    defaults = {
        _MIXTURE: {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 8,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
        },
        _SOLAR: {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts_per_tok": 8,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1280,
            "norm_topk_prob": True,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, norm, solar = read_sizes(fields), read_norm(fields), architecture == _SOLAR
        attention = attention_of(
            sizes,
            read_partial_rotary(fields, sizes, default=1.0 if solar else 0.5),
            qkv_bias=fields.flag("attention_bias"),
            qk_norm=norm if fields.flag("use_qk_norm") and not solar else None,
        )
        experts, first = read_routed_experts(fields, activation), 0
        mlp: MlpSpec | ExpertsSpec = experts
        if solar:
            fields.read |= {"intermediate_size", "first_k_dense_replace"}  # no layer uses these keys
        else:
            mlp = MlpSpec(read_width(fields), activation)
            first = fields.integer("first_k_dense_replace", 0, LONGEST, default=1)

        def layer(number: int) -> LayerSpec:
            return LayerSpec(attention, experts if number >= first else mlp, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        refuse_gating(fields)
        fields.raw("rope.dimension_sections")  # for images; a text has one position
        return (
            usual_config(fields, shape_of, partial=True)
            | routed_config(fields)
            | {
                "architectures": [_MIXTURE],
                "attention_bias": shape_of(Key("q_bias", 0)) is not None,
                "use_qk_norm": shape_of(Key("q_norm", 0)) is not None,
            }
        )
