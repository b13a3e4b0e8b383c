"""CWM: Llama with windows in most layers."""

from __future__ import annotations

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
from mpillm.model.families.layer_types import FULL, SLIDING, read_layer_types
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST


class Cwm(Family):
    """Every fourth layer has no window, from the first on."""

    architectures = {"CwmForCausalLM": "cwm"}
    defaults = {
        "CwmForCausalLM": {
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
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        sizes, norm = read_sizes(fields), read_norm(fields)
        rotary = read_rotary(fields, sizes)
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        every = [SLIDING if number % 4 else FULL for number in range(sizes.n_layers)]
        types = read_layer_types(fields, sizes.n_layers, FULL, SLIDING) or every
        mlp = MlpSpec(read_width(fields), read_activation(fields), bias=fields.flag("mlp_bias"))

        def layer(number: int) -> LayerSpec:
            attention = attention_of(sizes, rotary, window if types[number] == SLIDING else 0)
            return LayerSpec(attention, mlp, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)
