"""Seed-OSS: Llama with biases on q, k and v, and perhaps on attention's output."""

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
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    usual_config,
)
from mpillm.weights.names import Names
from mpillm.weights.roles import Key


class Seed(Family):
    """Dense pre-norm layers."""

    architectures = {"SeedOssForCausalLM": "seed_oss"}
    gguf = ("seed_oss",)
    names = Names(gguf={"blk.{l}.post_attention_norm.weight": ("ffn_norm",)})
    defaults = {
        "SeedOssForCausalLM": {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        attention = attention_of(
            sizes,
            read_rotary(fields, sizes),
            qkv_bias=fields.flag("attention_bias"),
            o_bias=fields.flag("attention_out_bias"),
        )
        mlp = MlpSpec(width, activation, bias=fields.flag("mlp_bias"))
        layer = LayerSpec(attention, mlp, Norms(norm), Norms(norm))
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        refuse_window(fields)
        config = usual_config(fields, shape_of)
        return config | {
            "architectures": ["SeedOssForCausalLM"],
            "attention_bias": shape_of(Key("q_bias", 0)) is not None,
        }
