"""Granite: Llama with multipliers of embeddings, attention, residuals and logits."""

from __future__ import annotations

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    model,
    read_activation,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import AttentionSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec


class Granite(Family):
    """Dense Granite 3 and later."""

    architectures = {"GraniteForCausalLM": "granite"}
    defaults = {"GraniteForCausalLM": {"max_position_embeddings": 2048, **SMALL_BOS}}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "silu", "swish")
        sizes, width = read_sizes(fields), read_width(fields)
        attention_bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
        norm = read_norm(fields)
        scale, residual, embedding, logits = (
            fields.number(key, 1e-9, 1e9, default=1.0)
            for key in (
                "attention_multiplier",
                "residual_multiplier",
                "embedding_multiplier",
                "logits_scaling",
            )
        )
        attention = AttentionSpec(
            sizes.n_heads,
            sizes.n_kv_heads,
            sizes.head_dim,
            scale,
            read_rotary(fields, sizes),
            qkv_bias=attention_bias,
            o_bias=attention_bias,
        )
        layer = LayerSpec(
            attention, MlpSpec(width, activation, bias=mlp_bias), Norms(norm), Norms(norm), residual
        )
        return model(
            fields,
            architecture,
            sizes,
            lambda number: layer,
            norm,
            embedding_scale=embedding,
            logit_scale=1 / logits,
        )
