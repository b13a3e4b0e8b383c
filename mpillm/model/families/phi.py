"""Phi-3 and Phi-4: Llama with fused matrices and RoPE that changes beyond a length."""

from __future__ import annotations

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
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.names import Names

_PHI3 = "Phi3ForCausalLM"


class Phi(Family):
    """q, k and v lie in one tensor, gate and up in another; there may be a window in all layers."""

    architectures = {_PHI3: "phi3"}
    names = Names(
        hf={
            "layers.{l}.self_attn.qkv_proj.weight": ("q", "k", "v"),
            "layers.{l}.mlp.gate_up_proj.weight": ("gate", "up"),
        }
    )
    defaults = {
        _PHI3: {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "silu", "swish")
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        attention = attention_of(sizes, read_partial_rotary(fields, sizes, default=1.0), window)
        layer = LayerSpec(attention, MlpSpec(width, activation), Norms(norm), Norms(norm))
        return model(fields, architecture, sizes, lambda number: layer, norm)
