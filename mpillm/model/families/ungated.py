"""Llama's layers with an MLP without a gate, relu²: Arcee, Nemotron 3 and 4 (and Minitron), Jais 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    usual_config,
)
from mpillm.weights.names import Names
from mpillm.weights.roles import Key

_ARCEE, _NEMOTRON, _JAIS = "ArceeForCausalLM", "NemotronForCausalLM", "Jais2ForCausalLM"


class Ungated(Family):
    """Nemotron and Jais have LayerNorm with a bias; Nemotron's weights of norms are stored minus one.

    In GGUF files they are stored as they are. The key "gguf_norms" says so.
    """

    architectures: ClassVar[Mapping[str, str]] = {_NEMOTRON: "nemotron", _JAIS: "jais2"}
    gguf: ClassVar[tuple[str, ...]] = ("nemotron", "jais2")
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        _NEMOTRON: {"max_position_embeddings": 4096, "norm_eps": 1e-5, "bos_token_id": 2, "eos_token_id": 3},
        _JAIS: {
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 150024,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "relu2")
        sizes, width = read_sizes(fields), read_width(fields)
        attention_bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
        if architecture == _ARCEE:
            norm = read_norm(fields)
        elif architecture == _JAIS:
            norm = read_norm(fields, "layer_norm_eps", centred=True, bias=True)
        else:
            offset = 0.0 if fields.flag("gguf_norms") else 1.0
            norm = read_norm(fields, "norm_eps", centred=True, bias=True, offset=offset)
        part = 0.5 if architecture == _NEMOTRON else 1.0
        attention = attention_of(
            sizes,
            read_partial_rotary(fields, sizes, part),
            qkv_bias=attention_bias,
            o_bias=attention_bias,
        )
        mlp = MlpSpec(width, activation, gated=False, bias=mlp_bias)
        layer = LayerSpec(attention, mlp, Norms(norm), Norms(norm))
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        named, eps = {
            "arcee": (_ARCEE, ("layer_norm_rms_epsilon", "rms_norm_eps")),
            "nemotron": (_NEMOTRON, ("layer_norm_epsilon", "norm_eps")),
            "jais2": (_JAIS, ("layer_norm_epsilon", "layer_norm_eps")),
        }[fields.kind]
        refuse_experts(fields)
        refuse_window(fields)
        config = usual_config(fields, shape_of, eps, partial=named == _NEMOTRON)
        if named == _NEMOTRON:
            config["gguf_norms"] = True
        return config | {
            "architectures": [named],
            "hidden_act": "relu2",
            "attention_bias": shape_of(Key("q_bias", 0)) is not None,
            "mlp_bias": shape_of(Key("up_bias", 0)) is not None,
        }


class Arcee(Ungated):
    """RMS norms; its GGUF files have the rows of q and k in llama.cpp's order."""

    architectures = {_ARCEE: "arcee"}
    gguf = ("arcee",)
    names = Names(rope_pairs=True)
    defaults = {
        _ARCEE: {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        }
    }
