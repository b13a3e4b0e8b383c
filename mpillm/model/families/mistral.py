"""Mistral, and Mixtral with its experts: Llama with a sliding window. (In GGUF files both are "llama".)"""

from __future__ import annotations

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    attention_of,
    model,
    read_activation,
    read_chosen,
    read_expert_count,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
    read_windows,
    refuse_qk_norm,
)
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST

_USUAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, **SMALL_BOS}
_DENSE, _MIXTURE = "MistralForCausalLM", "MixtralForCausalLM"


class Mistral(Family):
    """Dense, or in each layer experts as wide as the dense MLP, whose weights are divided by their sum."""

    architectures = {_DENSE: "mistral", _MIXTURE: "mixtral"}
    defaults = {
        _DENSE: {"sliding_window": 4096, **_USUAL},
        _MIXTURE: {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            **_USUAL,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "silu", "swish")
        sizes, width = read_sizes(fields), read_width(fields)
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        windows = read_windows(fields, architecture, sizes.n_layers, window, 0, some=False)
        mlp: MlpSpec | ExpertsSpec = MlpSpec(width, activation)
        if architecture == _MIXTURE:
            count = read_expert_count(fields)
            if count == 0:
                raise fields.fail("num_local_experts", "but must be at least 1")
            if fields.raw("norm_topk_prob") is False:
                raise fields.fail("norm_topk_prob", "but Mixtral always divides by the sum")
            mlp = ExpertsSpec(count, width, RouterSpec(read_chosen(fields, count)), activation)
        norm, rotary = read_norm(fields), read_rotary(fields, sizes)
        refuse_qk_norm(fields, architecture, has=False)

        def layer(number: int) -> LayerSpec:
            attention = attention_of(
                sizes,
                rotary,
                windows[number],
            )
            return LayerSpec(attention, mlp, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)
