"""OLMo 2: norms only after attention and MLP, and norms of q and k over the whole projection."""

from __future__ import annotations

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
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
from mpillm.weights.names import Names


class Olmo(Family):
    """Post-norm layers. The norm of a whole row of q needs all heads, so attention is not cut into shards."""

    architectures = {"Olmo2ForCausalLM": "olmo2"}
    names = Names(
        hf={
            "layers.{l}.post_attention_layernorm.weight": ("attn_post_norm",),
            "layers.{l}.post_feedforward_layernorm.weight": ("ffn_post_norm",),
        }
    )
    defaults = {
        "Olmo2ForCausalLM": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279}
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "silu", "swish")
        sizes, width = read_sizes(fields), read_width(fields)
        bias, norm = fields.flag("attention_bias"), read_norm(fields)
        attention = AttentionSpec(
            sizes.n_heads,
            sizes.n_kv_heads,
            sizes.head_dim,
            sizes.head_dim**-0.5,
            read_rotary(fields, sizes),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=norm,
            qk_norm_whole=True,
        )
        layer = LayerSpec(attention, MlpSpec(width, activation), Norms(after=norm), Norms(after=norm))
        return model(fields, architecture, sizes, lambda number: layer, norm)
