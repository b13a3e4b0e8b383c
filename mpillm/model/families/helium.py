"""Helium: Llama with RoPE of neighbouring dimensions."""

from __future__ import annotations

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec


class Helium(Family):
    """With attention_bias, q, k and v have biases, but the output of attention has none."""

    architectures = {"HeliumForCausalLM": "helium"}
    defaults = {
        "HeliumForCausalLM": {
            "num_key_value_heads": 20,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-8,
            **SMALL_BOS,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        sizes, norm = read_sizes(fields), read_norm(fields)
        rotary = read_rotary(fields, sizes, interleaved=True)
        attention = attention_of(sizes, rotary, qkv_bias=fields.flag("attention_bias"))
        mlp = MlpSpec(read_width(fields), read_activation(fields), bias=fields.flag("mlp_bias"))
        layer = LayerSpec(attention, mlp, Norms(norm), Norms(norm))
        return model(fields, architecture, sizes, lambda number: layer, norm)
