"""SmolLM3: Llama in which some layers have no RoPE."""

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
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    usual_config,
)
from mpillm.weights.names import Names


class SmolLM3(Family):
    """`no_rope_layers` has a 1 for each layer with RoPE; those without it may have a sliding window."""

    architectures = {"SmolLM3ForCausalLM": "smollm3"}
    gguf = ("smollm3",)
    tied = True
    names = Names(rope_pairs=True)
    defaults = {
        "SmolLM3ForCausalLM": {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "silu", "swish")
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        attention_bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
        every = fields.integer("no_rope_layer_interval", 1, LONGEST, default=4)
        rope = fields.integers("no_rope_layers", 0, 1)
        if not rope:
            rope = tuple(int((layer + 1) % every != 0) for layer in range(sizes.n_layers))
        if len(rope) != sizes.n_layers:
            raise fields.fail("no_rope_layers", f"but must have a number for each of {sizes.n_layers} layers")
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        windows = (0,) * sizes.n_layers
        if not fields.flag("use_sliding_window"):
            fields.raw("layer_types")  # transformers looks at them only if windows are in use
        elif fields.raw("layer_types") is None:
            windows = tuple(0 if rotates else window for rotates in rope)
        else:
            windows = read_windows(fields, architecture, sizes.n_layers, window, 0, some=True)
        rotary = read_rotary(fields, sizes)

        def layer(number: int) -> LayerSpec:
            attention = attention_of(
                sizes,
                rotary if rope[number] else None,
                windows[number],
                qkv_bias=attention_bias,
                o_bias=attention_bias,
            )
            return LayerSpec(attention, MlpSpec(width, activation, bias=mlp_bias), Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        refuse_window(fields)
        config = usual_config(fields, shape_of)
        return config | {"architectures": ["SmolLM3ForCausalLM"]}
