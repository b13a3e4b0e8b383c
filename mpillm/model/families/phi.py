"""Phi-3, Phi-4 and Phi-3.5-MoE: Llama with fused matrices or experts, and RoPE that changes beyond a length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    Sizes,
    attention_of,
    model,
    read_activation,
    read_expert_count,
    read_norm,
    read_partial_rotary,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Rotary
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST, rope_parameters
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, refuse_experts, usual_config
from mpillm.weights.names import Names
from mpillm.weights.roles import Key

_PHI3, _MIXTURE = "Phi3ForCausalLM", "PhimoeForCausalLM"
_QKV = "q", "k", "v"


class Phi(Family):
    """q, k and v lie in one tensor, gate and up in another; there may be a window in all layers.

    The mixture has LayerNorm, and a router whose weights do not sum to 1.
    """

    architectures = {_PHI3: "phi3", _MIXTURE: "phimoe"}
    gguf = ("phi3", "phimoe")
    names = Names(
        hf={
            "layers.{l}.self_attn.qkv_proj.weight": _QKV,
            "layers.{l}.mlp.gate_up_proj.weight": ("gate", "up"),
            "layers.{l}.mlp.router.weight": ("router",),
        },
        gguf={"blk.{l}.ffn_up.weight": ("gate", "up")},
    )
    defaults = {
        _PHI3: {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        _MIXTURE: {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            **SMALL_BOS,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        if architecture == _MIXTURE:
            return self._mixture(fields)
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        attention = attention_of(sizes, read_partial_rotary(fields, sizes, default=1.0), window)
        layer = LayerSpec(attention, MlpSpec(width, activation), Norms(norm), Norms(norm))
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def _mixture(self, fields: Fields) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, bias = read_sizes(fields), read_width(fields), fields.flag("attention_bias")
        norm = read_norm(fields, default=1e-5, centred=True, bias=True)
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        count = read_expert_count(fields)
        if fields.integer("num_experts_per_tok", 1, 2**16) != 2 or count < 2:
            raise fields.fail("num_experts_per_tok", "but the router always chooses 2")
        router = RouterSpec(2, "sparsemixer", jitter=fields.number("router_jitter_noise", 0, 1e6))
        fields.raw("input_jitter_noise")  # used only in training
        attention = attention_of(sizes, _scaled(fields, sizes), window, qkv_bias=bias, o_bias=bias)
        layer = LayerSpec(attention, ExpertsSpec(count, width, router, activation), Norms(norm), Norms(norm))
        return model(
            fields, _MIXTURE, sizes, lambda number: layer, norm, head_bias=fields.flag("lm_head_bias")
        )

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        config = usual_config(fields, shape_of, partial=True)
        config["sliding_window"] = fields.integer("attention.sliding_window", 0) or None
        if fields.kind == "phi3":
            refuse_experts(fields)
            original = fields.integer(
                "rope.scaling.original_context_length", config["max_position_embeddings"]
            )
            return config | {"architectures": [_PHI3], "original_max_position_embeddings": original}
        # How near two experts must be to count as a tie is in no field: all published models have the default.
        scale = fields.number("rope.scaling.attn_factor", 1.0) or 1.0
        return config | {
            "architectures": [_MIXTURE],
            "num_local_experts": fields.integer("expert_count"),
            "num_experts_per_tok": fields.integer("expert_used_count"),
            "attention_bias": shape_of(Key("o_bias", 0)) is not None,
            "lm_head_bias": shape_of(Key("head_bias")) is not None,
            "rope_parameters": {"short_mscale": scale, "long_mscale": scale},
        }


def _scaled(fields: Fields, sizes: Sizes) -> Rotary:
    """RoPE of which cosines and sines are multiplied by short_mscale, or by long_mscale in long sequences.

    Long sequences have the long factors, as the model's authors, vLLM, llama.cpp and transformers 4 compute it;
    transformers 5.24 computes short factors times long_mscale.
    """
    rotary = read_rotary(fields, sizes)
    if rotary.config.kind == "default":
        return rotary
    rope = rope_parameters(fields)
    short, long = (rope.number(key, 0, 1e6, default=1.0) for key in ("short_mscale", "long_mscale"))
    return replace(rotary, config=replace(rotary.config, attention_factor=short, long_attention_factor=long))
