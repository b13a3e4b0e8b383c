"""Mistral, Ministral and Mixtral: Llama with windows, tuned scores or experts.

GGUF files of Mistral and Mixtral are "llama", those of Ministral 3 "mistral3".
"""

from __future__ import annotations

from typing import Any

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
    refuse_qk_norm,
)
from mpillm.model.families.layer_types import read_windows
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Tuning
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST, rope_parameters
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    usual_config,
)
from mpillm.weights.names import Names

_USUAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, **SMALL_BOS}
_DENSE, _MIXTURE = "MistralForCausalLM", "MixtralForCausalLM"
_SOME_WINDOWS, _TUNED = "MinistralForCausalLM", "Ministral3ForCausalLM"


class Mistral(Family):
    """Dense, or in each layer experts as wide as the dense MLP, whose weights are divided by their sum.

    Ministral has windows in some layers, and Ministral 3 scores that are tuned by the query's position.
    """

    architectures = {_DENSE: "mistral", _MIXTURE: "mixtral", _SOME_WINDOWS: "ministral", _TUNED: "ministral3"}
    gguf = ("mistral3",)
    gguf_adapters = ("llama",)
    names = Names(rope_pairs=True)
    defaults = {
        _DENSE: {"sliding_window": 4096, **_USUAL},
        _MIXTURE: {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            **_USUAL,
        },
        _SOME_WINDOWS: {"sliding_window": 4096, **_USUAL},
        _TUNED: {
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            **_USUAL,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width = read_sizes(fields), read_width(fields)
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        windows = read_windows(
            fields, architecture, sizes.n_layers, window, 0, some=architecture == _SOME_WINDOWS
        )
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
        tuning = _tuning(fields) if architecture == _TUNED else None

        def layer(number: int) -> LayerSpec:
            attention = attention_of(
                sizes,
                rotary,
                windows[number],
                tuning=tuning,
            )
            return LayerSpec(attention, mlp, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        refuse_window(fields)
        config = usual_config(fields, shape_of)
        rope: dict[str, Any] = {}
        if fields.raw("rope.scaling.type") == "yarn":  # llama.cpp takes mscale to be 1
            rope = {"mscale": 1.0, "mscale_all_dim": fields.number("rope.scaling.yarn_log_multiplier", 0.0)}
        if beta := fields.number("attention.temperature_scale", 0.0):
            rope["llama_4_scaling_beta"] = beta
            return config | {"architectures": [_TUNED], "rope_parameters": rope}
        return config | {"architectures": [_DENSE], "sliding_window": None, "rope_parameters": rope}


def _tuning(fields: Fields) -> Tuning | None:
    """Return the growth of scores with positions, which the RoPE table defines."""
    rope = rope_parameters(fields)
    beta = rope.optional_number("llama_4_scaling_beta", 0, 1e6)
    if not beta:
        return None
    return Tuning(beta, rope.integer("original_max_position_embeddings", 1, LONGEST), offset=0)
