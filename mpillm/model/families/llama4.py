"""The text models of Llama 4: chunked attention with RoPE, every few layers full attention without, and experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    attention_of,
    model,
    read_activation,
    read_chosen,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.families.layer_types import read_layer_types
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Tuning
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, usual_config
from mpillm.weights.names import Names

_TEXT = "Llama4ForCausalLM"
_FULL, _CHUNKED = "full_attention", "chunked_attention"
# Experts of the model whose q and k are not normed (Maverick), which no field of a GGUF says.
_WITHOUT_NORMS = 128


class Llama4(Family):
    """q and k are normed without weights; an expert's input is multiplied by the sigmoid of its score."""

    architectures = {_TEXT: "llama4_text"}
    gguf = ("llama4",)
    names = Names(
        hf={
            "layers.{l}.feed_forward.router.weight": ("router",),
            **{
                f"layers.{{l}}.feed_forward.{part}{name}_proj.weight": (prefix + name,)
                for name in ("gate", "up", "down")
                for part, prefix in (("", ""), ("shared_expert.", "shared_"))
            },
            # As quantised files have them.
            **{
                f"layers.{{l}}.feed_forward.experts.{{e}}.{name}_proj.weight": (name,)
                for name in ("gate", "up", "down")
            },
        },
        hf_stacked={
            "layers.{l}.feed_forward.experts.gate_up_proj": ("gate", "up"),
            "layers.{l}.feed_forward.experts.down_proj": ("down",),
        },
        hf_transposed=frozenset(
            f"layers.{{l}}.feed_forward.experts.{name}_proj" for name in ("gate_up", "down")
        ),
    )
    defaults = {
        _TEXT: {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_theta": 5e5,
            "rms_norm_eps": 1e-5,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "attention_chunk_size": 8192,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, norm, bias = read_sizes(fields), read_norm(fields), fields.flag("attention_bias")
        width = read_width(fields)
        count = fields.integer("num_local_experts", 1, 2**16)
        experts = ExpertsSpec(
            count,
            width,
            RouterSpec(read_chosen(fields, count), scoring="sigmoid", normalise=False),
            activation,
            shared=MlpSpec(width, activation, prefix="shared_"),
            scaled_input=True,
        )
        dense = MlpSpec(read_width(fields, "intermediate_size_mlp"), activation)
        sparse, turns = _sparse(fields, sizes.n_layers), _turns(fields, sizes.n_layers)
        rotary = read_rotary(fields, sizes, interleaved=True)
        qk_norm = None
        if fields.flag("use_qk_norm"):
            # It comes after RoPE, which changes no length but by the factor, and that has no effect then.
            qk_norm = NormSpec(norm.eps, weights=False)
            rotary = replace(rotary, config=replace(rotary.config, attention_factor=1.0))
        tuned, length = fields.raw("attn_temperature_tuning"), fields.integer("floor_scale", 1, LONGEST)
        if tuned not in (True, False, 0, 1, 4, None):  # published files have 4 for true
            raise fields.fail("attn_temperature_tuning", "but must be true or false")
        tuning = Tuning(fields.number("attn_scale", 0, 1e6), length, offset=1) if tuned else None
        chunk = fields.optional_integer("attention_chunk_size", 1, LONGEST) or 0
        kinds = read_layer_types(fields, sizes.n_layers, _FULL, _CHUNKED)
        if kinds is None:
            kinds = [_CHUNKED if turn and chunk else _FULL for turn in turns]
        if _CHUNKED in kinds and not chunk:
            raise fields.fail("layer_types", "but there is no attention_chunk_size")

        def layer(number: int) -> LayerSpec:
            turn, chunked = turns[number], kinds[number] == _CHUNKED
            attention = attention_of(
                sizes,
                rotary if turn else None,
                chunk if chunked else 0,
                chunked=chunked,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm=qk_norm if turn else None,
                tuning=None if turn else tuning,
            )
            return LayerSpec(attention, experts if sparse[number] else dense, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        # How long chunks are, which layers have none, and how scores are tuned is in no field.
        config, count = usual_config(fields, shape_of), fields.integer("expert_count")
        return config | {
            "architectures": [_TEXT],
            "intermediate_size_mlp": config["intermediate_size"],
            "intermediate_size": fields.integer("expert_feed_forward_length"),
            "num_local_experts": count,
            "num_experts_per_tok": fields.integer("expert_used_count"),
            "interleave_moe_layer_step": fields.integer("interleave_moe_layer_step"),
            "use_qk_norm": count != _WITHOUT_NORMS,
        }


def _sparse(fields: Fields, n_layers: int) -> list[bool]:
    """Return the layers that have experts."""
    step = fields.integer("interleave_moe_layer_step", 1, LONGEST, default=1)
    if fields.raw("moe_layers") is None:
        return [layer % step == step - 1 for layer in range(n_layers)]
    chosen = fields.integers("moe_layers", 0, LONGEST)
    return [layer in chosen for layer in range(n_layers)]


def _turns(fields: Fields, n_layers: int) -> list[bool]:
    """Return the layers that have RoPE: no_rope_layers has a 1 for each of them."""
    interval = fields.integer("no_rope_layer_interval", 1, LONGEST, default=4)
    given = fields.integers("no_rope_layers", 0, 1)
    if not given:
        return [(layer + 1) % interval != 0 for layer in range(n_layers)]
    if len(given) < n_layers:
        raise fields.fail("no_rope_layers", f"but must be a list of {n_layers} numbers, 0 or 1")
    return [turn == 1 for turn in given[:n_layers]]
