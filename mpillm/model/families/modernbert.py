"""ModernBERT: an encoder with RoPE, windows in most layers, and gated MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    Sizes,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_rotary,
    read_width,
)
from mpillm.model.families.bert import encoder_sizes, unread, with_biases
from mpillm.model.families.layer_types import FULL, SLIDING, read_layer_types
from mpillm.model.families.tasks import read_decision, read_labels
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Rotary
from mpillm.model.layers.entry import EntrySpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.pooled import ClassifierSpec, DenseSpec, Function, Pooling
from mpillm.model.rope import RopeConfig
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, encoder_config, window_types
from mpillm.weights.names import Names
from mpillm.weights.roles import Key

_MODERN = "ModernBertModel"
_FUNCTIONS: Mapping[str, Function] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}
_POOLINGS: Mapping[str, Pooling] = {"cls": "cls", "mean": "mean"}


class ModernBert(Family):
    """The first layer's attention has no norm before it, for embeddings have one."""

    architectures = {_MODERN: "modernbert"}
    gguf = ("modern-bert",)
    names = Names(
        hf={
            "embeddings.tok_embeddings.weight": ("embed",),
            **with_biases(
                {
                    "embeddings.norm": "embed_norm",
                    "layers.{l}.attn_norm": "attn_norm",
                    "layers.{l}.attn.Wo": "o",
                    "layers.{l}.mlp_norm": "ffn_norm",
                    "layers.{l}.mlp.Wo": "down",
                    "final_norm": "final_norm",
                    "head.dense": "pooler",
                    "head.norm": "pooler_norm",
                    "classifier": "classifier",
                }
            ),
            "layers.{l}.attn.Wqkv.weight": ("q", "k", "v"),
            "layers.{l}.attn.Wqkv.bias": ("q_bias", "k_bias", "v_bias"),
            "layers.{l}.mlp.Wi.weight": ("gate", "up"),
            "layers.{l}.mlp.Wi.bias": ("gate_bias", "up_bias"),
            **unread("decoder"),
        },
        gguf={
            "blk.{l}.ffn_up.weight": ("gate", "up"),
            "blk.{l}.ffn_up.bias": ("gate_bias", "up_bias"),
        },
    )
    defaults = {
        _MODERN: {
            "max_position_embeddings": 8192,
            "hidden_activation": "gelu",
            "norm_eps": 1e-5,
            "local_attention": 128,
            "bos_token_id": 50281,
            "eos_token_id": 50282,
            "classifier_pooling": "cls",
            "classifier_activation": "gelu",
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        fields.read |= {
            "gguf_pooled",
            "classifier_activation",
            "classifier_bias",
            "classifier_pooling",
            "position_embedding_type",
            "layer_norm_eps",
            "reference_compile",
            "deterministic_flash_attn",
        }
        activation = read_activation(fields, "gelu", "hidden_activation")
        sizes = encoder_sizes(fields, fields.integer("max_position_embeddings", 1, LONGEST))
        norm = _norm(fields)
        bias = fields.flag("attention_bias")
        mlp = MlpSpec(read_width(fields), activation, bias=fields.flag("mlp_bias"))
        # The number of tokens on both sides together.
        window = fields.integer("local_attention", 1, LONGEST) // 2 + 1
        every = fields.integer("global_attn_every_n_layers", 1, LONGEST, default=3)
        types = read_layer_types(fields, sizes.n_layers, FULL, SLIDING) or [
            SLIDING if number % every else FULL for number in range(sizes.n_layers)
        ]
        rotaries = {kind: _rotary(fields, sizes, kind) for kind in (FULL, SLIDING)}

        def layer(number: int) -> LayerSpec:
            attention = attention_of(
                sizes,
                rotaries[types[number]],
                window if types[number] == SLIDING else 0,
                qkv_bias=bias,
                o_bias=bias,
                bidirectional=True,
            )
            entry = None if number else EntrySpec(norm=norm)
            return LayerSpec(attention, mlp, Norms(norm if number else None), Norms(norm), entry=entry)

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        config = encoder_config(fields, shape_of, _MODERN)
        del config["type_vocab_size"], config["hidden_act"]
        said = fields.raw("attention.sliding_window_pattern")
        if isinstance(said, list):
            config["layer_types"] = window_types(fields, config["num_hidden_layers"], 1)
        return config | {
            "norm_eps": config.pop("layer_norm_eps"),
            "norm_bias": shape_of(Key("final_norm_bias")) is not None,
            "attention_bias": shape_of(Key("o_bias", 0)) is not None,
            "mlp_bias": shape_of(Key("down_bias", 0)) is not None,
            "classifier_pooling": "mean",  # as llama.cpp does, whatever the model was trained with
            "classifier_bias": "pooler_bias" in config["gguf_pooled"],
            "hidden_activation": fields.raw("hidden_act") or fields.raw("hidden_activation") or "gelu",
            "local_attention": fields.integer("attention.sliding_window", 128),
            "global_attn_every_n_layers": said if type(said) is int else 3,
            "rope_parameters": {
                FULL: {"rope_theta": fields.number("rope.freq_base", 160000.0), "rope_type": "default"},
                SLIDING: {"rope_theta": fields.number("rope.freq_base_swa", 10000.0), "rope_type": "default"},
            },
        }

    def classifier(self, fields: Fields) -> ClassifierSpec:
        labels, hidden = read_labels(fields), fields.integer("hidden_size", 1, 2**20)
        function = _FUNCTIONS[fields.one_of("classifier_activation", tuple(_FUNCTIONS), default="gelu")]
        pooling = _POOLINGS[fields.one_of("classifier_pooling", tuple(_POOLINGS), default="cls")]
        layers = (
            DenseSpec("pooler", hidden, fields.flag("classifier_bias"), function, _norm(fields)),
            DenseSpec("classifier", len(labels), bias=True),
        )
        return ClassifierSpec(pooling, layers, labels, read_decision(fields, len(labels)))


def _norm(fields: Fields) -> NormSpec:
    return read_norm(fields, "norm_eps", 1e-5, centred=True, bias=fields.flag("norm_bias"))


def _rotary(fields: Fields, sizes: Sizes, kind: str) -> Rotary:
    """RoPE of the layers of a type, whose base older files name apart."""
    key, base = ("global_rope_theta", 160000.0) if kind == FULL else ("local_rope_theta", 10000.0)
    theta = fields.optional_number(key, 1.0, 1e30)
    if fields.table("rope_parameters"):
        return read_rotary(fields, sizes, layer_type=kind)
    return Rotary(RopeConfig(base if theta is None else theta), sizes.head_dim)
