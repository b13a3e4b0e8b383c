"""Command R (Cohere) and Command R7B or A (Cohere 2): attention and MLP beside each other, after one LayerNorm."""

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
    refuse_qk_norm,
)
from mpillm.model.families.layer_types import FULL, SLIDING, read_window_types
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, refuse_experts, usual_config, window_types
from mpillm.weights.roles import Key

_COHERE, _COHERE2 = "CohereForCausalLM", "Cohere2ForCausalLM"
_USUAL = {
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "logit_scale": 0.0625,
    "bos_token_id": 5,
    "eos_token_id": 255001,
}


class Cohere(Family):
    """RoPE is of neighbouring dimensions. Cohere 2 has windows in most layers, and RoPE in those alone."""

    architectures = {_COHERE: "cohere", _COHERE2: "cohere2"}
    gguf = ("command-r", "cohere2")
    tied = True
    defaults = {_COHERE: _USUAL, _COHERE2: {**_USUAL, "rope_theta": 1e4, "sliding_window": 4096}}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, bias = read_sizes(fields), read_width(fields), fields.flag("attention_bias")
        norm = read_norm(fields, "layer_norm_eps", 1e-5, centred=True)
        rotary = read_rotary(fields, sizes, interleaved=True)
        fields.one_of("position_embedding_type", ("rope_gptj",), default="rope_gptj")
        by_head = architecture == _COHERE and fields.flag("use_qk_norm")
        refuse_qk_norm(fields, architecture, has=by_head)
        window, types = 0, [FULL] * sizes.n_layers
        if architecture == _COHERE2:
            window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
            types = read_window_types(fields, sizes.n_layers, every=4)

        def layer(number: int) -> LayerSpec:
            slides = types[number] == SLIDING and window > 0
            attention = attention_of(
                sizes,
                rotary if architecture == _COHERE or slides else None,
                window if slides else 0,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm=norm if by_head else None,
                qk_norm_by_head=by_head,
            )
            return LayerSpec(attention, MlpSpec(width, activation), Norms(norm), Norms(), parallel=True)

        return model(
            fields,
            architecture,
            sizes,
            layer,
            norm,
            logit_scale=fields.number("logit_scale", 1e-9, 1e9),
        )

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        config = usual_config(fields, shape_of, ("layer_norm_epsilon", "layer_norm_eps"))
        config["logit_scale"] = fields.number("logit_scale")
        if fields.kind == "command-r":
            by_head = shape_of(Key("q_norm", 0)) is not None
            return config | {"architectures": [_COHERE], "use_qk_norm": by_head}
        return config | {
            "architectures": [_COHERE2],
            "sliding_window": fields.integer("attention.sliding_window"),
            "layer_types": window_types(fields, config["num_hidden_layers"], 4),
        }
