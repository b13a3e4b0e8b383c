"""MiniMax-M2: experts in all layers, norms of q and k over the whole projection, and RoPE of a part of each head."""

from __future__ import annotations

from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    attention_of,
    model,
    read_activation,
    read_chosen,
    read_expert_count,
    read_norm,
    read_partial_rotary,
    read_sizes,
    read_width,
    refuse_qk_norm,
)
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, refuse_gating, refuse_window, usual_config
from mpillm.weights.names import Names


class MiniMax(Family):
    """The router is a sigmoid with a correction."""

    architectures = {"MiniMaxM2ForCausalLM": "minimax_m2"}
    gguf = ("minimax-m2",)
    names = Names(
        hf={"layers.{l}.block_sparse_moe.e_score_correction_bias": ("router_correction",)},
    )
    defaults = {
        "MiniMaxM2ForCausalLM": {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 196608,
            "rope_theta": 5e6,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "bos_token_id": 200034,
            "eos_token_id": 200020,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        # How the published files say it.
        rotary_dim = fields.optional_integer("rotary_dim", 2, sizes.head_dim) or sizes.head_dim
        rotary = read_partial_rotary(fields, sizes, default=rotary_dim / sizes.head_dim)
        refuse_qk_norm(fields, architecture, has=True)
        _refuse_others(fields)
        attention = attention_of(sizes, rotary, qk_norm=norm, qk_norm_whole=True)
        count = read_expert_count(fields)
        router = RouterSpec(read_chosen(fields, count), scoring="sigmoid", correction=True)
        layer = LayerSpec(attention, ExpertsSpec(count, width, router, activation), Norms(norm), Norms(norm))
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        refuse_gating(fields)
        config = usual_config(fields, shape_of, partial=True)
        return config | {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "intermediate_size": fields.integer("expert_feed_forward_length", 0)
            or config["intermediate_size"],
            "num_local_experts": fields.integer("expert_count"),
            "num_experts_per_tok": fields.integer("expert_used_count"),
        }


def _refuse_others(fields: Fields) -> None:
    """Check that a configuration describes a model that is built like the published ones; else ModelError."""
    for key, built in (
        ("qk_norm_type", "per_layer"),
        ("scoring_func", "sigmoid"),
        ("use_routing_bias", True),
        ("shared_intermediate_size", 0),
    ):
        if fields.raw(key) not in (None, built):
            raise fields.fail(key, f"but only {built} is supported")
