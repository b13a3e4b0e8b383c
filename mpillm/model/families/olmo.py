"""OLMo 2 and 3, and OLMoE with experts: norms of q and k over the whole projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    Sizes,
    attention_of,
    model,
    read_activation,
    read_chosen,
    read_expert_count,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.families.layer_types import FULL, SLIDING, read_layer_types
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Rotary
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope import RopeConfig
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    usual_config,
    window_types,
)
from mpillm.weights.names import AFTER_NORMS, Names

_OLMO2, _OLMO3, _MIXTURE = "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM"
_FLEX = "FlexOlmoForCausalLM"
_USUAL = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279}


class Olmo(Family):
    """Layers with norms after attention and MLP."""

    architectures = {_OLMO2: "olmo2", _OLMO3: "olmo3"}
    gguf = ("olmo2",)
    names = Names(hf=AFTER_NORMS)
    defaults = {_OLMO2: _USUAL, _OLMO3: {**_USUAL, "sliding_window": 4096, "rope_theta": 5e5}}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width = read_sizes(fields), read_width(fields)
        bias, norm = fields.flag("attention_bias"), read_norm(fields)
        window, types = 0, [FULL] * sizes.n_layers
        if architecture == _OLMO3:
            window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
            types = list(
                read_layer_types(fields, sizes.n_layers, FULL, SLIDING)
                or (SLIDING if (layer + 1) % 4 else FULL for layer in range(sizes.n_layers))
            )
        rotaries = _rotaries(fields, sizes, set(types))

        def layer(number: int) -> LayerSpec:
            attention = attention_of(
                sizes,
                rotaries[types[number]],
                window if types[number] == SLIDING else 0,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm=norm,
                qk_norm_whole=True,
            )
            return LayerSpec(attention, MlpSpec(width, activation), Norms(after=norm), Norms(after=norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        config = usual_config(fields, shape_of)
        window = fields.integer("attention.sliding_window", 0)
        if not window:
            return config | {"architectures": [_OLMO2]}
        return config | {
            "architectures": [_OLMO3],
            "sliding_window": window,
            "layer_types": window_types(fields, config["num_hidden_layers"], 4),
            "rope_local_base_freq": fields.raw("rope.freq_base_swa"),
        }


class Olmoe(Family):
    """Layers with norms before attention and experts."""

    architectures = {_MIXTURE: "olmoe"}
    gguf: ClassVar[tuple[str, ...]] = ("olmoe",)
    after: ClassVar[bool] = False  # norms are after them
    defaults = {
        _MIXTURE: {
            **_USUAL,
            "max_position_embeddings": 4096,
            "num_local_experts": 64,
            "num_experts_per_tok": 8,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias, count = fields.flag("attention_bias"), read_expert_count(fields)
        router = RouterSpec(read_chosen(fields, count), normalise=fields.flag("norm_topk_prob"))
        attention = attention_of(
            sizes,
            read_rotary(fields, sizes),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=norm,
            qk_norm_whole=True,
        )
        experts = ExpertsSpec(count, width, router, activation)
        norms = Norms(after=norm) if self.after else Norms(norm)
        layer = LayerSpec(attention, experts, norms, norms)
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        return usual_config(fields, shape_of) | {
            "architectures": [_MIXTURE],
            "num_experts": fields.integer("expert_count"),
            "num_experts_per_tok": fields.integer("expert_used_count"),
        }


class FlexOlmo(Olmoe):
    """Layers with norms after attention and experts."""

    architectures = {_FLEX: "flex_olmo"}
    gguf = ()
    after = True
    names = Names(hf=AFTER_NORMS)
    defaults = {
        _FLEX: {
            "max_position_embeddings": 4096,
            "rope_theta": 5e5,
            "num_local_experts": 7,
            "num_experts_per_tok": 5,
            "eos_token_id": 100257,
        }
    }


def _rotaries(fields: Fields, sizes: Sizes, types: set[str]) -> dict[str, Rotary]:
    """RoPE by layer type: what older files of OLMo 3 say of scaling is for layers without a window.

    GGUF files may have the base of windows apart.
    """
    parameters = fields.values.get("rope_parameters")
    if isinstance(parameters, Mapping) and any(isinstance(value, Mapping) for value in parameters.values()):
        return {kind: read_rotary(fields, sizes, layer_type=kind) for kind in types}
    found = read_rotary(fields, sizes)
    theta = fields.optional_number("rope_local_base_freq", 1.0, 1e30) or found.config.theta
    return {kind: found if kind == FULL else Rotary(RopeConfig(theta), found.dim) for kind in types}
