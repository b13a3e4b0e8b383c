"""Llama but for one thing: CWM has windows in most layers, Helium RoPE of neighbouring dimensions."""

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
from mpillm.model.families.layer_types import FULL, SLIDING, read_layer_types
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST

_CWM, _HELIUM = "CwmForCausalLM", "HeliumForCausalLM"


class Variants(Family):
    """Of CWM's layers every fourth has no window, from the first on."""

    architectures = {_CWM: "cwm", _HELIUM: "helium"}
    defaults = {
        _CWM: {
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 8192,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
        },
        _HELIUM: {
            "num_key_value_heads": 20,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-8,
            **SMALL_BOS,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        rotary = read_rotary(fields, sizes, interleaved=architecture == _HELIUM)
        window, types = 0, [FULL] * sizes.n_layers
        if architecture == _CWM:
            window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
            every = [SLIDING if number % 4 else FULL for number in range(sizes.n_layers)]
            types = list(read_layer_types(fields, sizes.n_layers, FULL, SLIDING) or every)
        # Helium's has none on the output, whatever the key says of it.
        qkv_bias = architecture == _HELIUM and fields.flag("attention_bias")
        mlp = MlpSpec(width, activation, bias=fields.flag("mlp_bias"))

        def layer(number: int) -> LayerSpec:
            own = window if types[number] == SLIDING else 0
            return LayerSpec(
                attention_of(sizes, rotary, own, qkv_bias=qkv_bias), mlp, Norms(norm), Norms(norm)
            )

        return model(fields, architecture, sizes, layer, norm)
