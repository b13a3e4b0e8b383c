"""dots.llm1: norms of each head's q and k, and after some dense layers experts that a sigmoid chooses."""

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
from mpillm.model.families.layer_types import read_windows
from mpillm.model.families.routed import read_routed_experts
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_gating,
    refuse_window,
    routed_config,
    usual_config,
)


class Dots(Family):
    """Qwen 3's attention and DeepSeek V3's experts."""

    architectures = {"Dots1ForCausalLM": "dots1"}
    gguf = ("dots1",)
    defaults = {
        "Dots1ForCausalLM": {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "sliding_window": 4096,
            "max_window_layers": 62,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "silu", "swish")
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias = fields.flag("attention_bias")
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        first_window = fields.integer("max_window_layers", 0, LONGEST)
        windows = read_windows(fields, architecture, sizes.n_layers, window, first_window, some=True)
        experts, first = (
            read_routed_experts(fields, shared=0),
            fields.integer("first_k_dense_replace", 0, LONGEST, 0),
        )
        rotary = read_rotary(fields, sizes)

        def layer(number: int) -> LayerSpec:
            attention = attention_of(sizes, rotary, windows[number], qkv_bias=bias, o_bias=bias, qk_norm=norm)
            mlp = experts if number >= first else MlpSpec(width, activation)
            return LayerSpec(attention, mlp, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        refuse_gating(fields)
        config = usual_config(fields, shape_of) | routed_config(fields)
        return config | {"architectures": ["Dots1ForCausalLM"], "sliding_window": None}
