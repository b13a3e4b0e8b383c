"""BERT and RoBERTa: encoders whose layers normalise sums, with learned positions, segments, and biases everywhere."""

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
    read_norm,
    read_width,
)
from mpillm.model.families.tasks import read_decision, read_labels
from mpillm.model.fields import Fields
from mpillm.model.layers.entry import EntrySpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.pooled import ClassifierSpec, DenseSpec, Function
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, encoder_config
from mpillm.weights.names import Names, Roles

_BERT, _ROBERTA, _XLM, _CAMEMBERT = "BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel"
_TANH: Function = "tanh"
_NONE: Function = "identity"
_SIZES = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
_LAYER = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "attention.output.LayerNorm": "attn_sum_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "ffn_sum_norm",
}


def with_biases(names: Mapping[str, str]) -> dict[str, Roles]:
    """Return the roles of weights and of their biases, of old files' norms (gamma and beta) too."""
    ends = (("weight", ""), ("bias", "_bias"), ("gamma", ""), ("beta", "_bias"))
    return {
        f"{name}.{end}": (role + of,)
        for name, role in names.items()
        for end, of in ends
        if end in ("weight", "bias") or "norm" in role
    }


def unread(*names: str) -> dict[str, Roles]:
    """Weights and biases that predict masked words, and what else vectors are not made of."""
    return {f"{name}.{end}": () for name in names for end in ("weight", "bias", "gamma", "beta")}


_NAMES: dict[str, Roles] = {
    "embeddings.word_embeddings.weight": ("embed",),
    "embeddings.position_embeddings.weight": ("positions",),
    "embeddings.token_type_embeddings.weight": ("segments",),
    "embeddings.position_ids": (),
    **with_biases({"embeddings.LayerNorm": "embed_norm"}),
    **with_biases({f"encoder.layer.{{l}}.{name}": role for name, role in _LAYER.items()}),
}


class Bert(Family):
    """A classifier is of the first token's state, after a dense layer with tanh (the pooler)."""

    architectures = {_BERT: "bert"}
    # Also RoBERTa's: converters cut off the positions that it does not use.
    gguf: ClassVar[tuple[str, ...]] = ("bert",)
    names = Names(
        hf={
            **_NAMES,
            **with_biases({"pooler.dense": "pooler", "classifier": "classifier"}),
            **unread("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
            **unread("cls.predictions", "cls.predictions.decoder", "cls.seq_relationship"),
        },
        hf_prefixes=("bert.",),
    )
    defaults = {_BERT: {**_SIZES, "max_position_embeddings": 512, "pad_token_id": 0}}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        return self._config(fields, architecture, padding=None)

    def classifier(self, fields: Fields) -> ClassifierSpec:
        return first_token_classifier(fields)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        return encoder_config(fields, shape_of, _BERT) | {"hidden_act": "gelu"}

    def _config(self, fields: Fields, architecture: str, padding: int | None) -> ModelConfig:
        """`padding`: as in `EntrySpec`."""
        fields.read |= {"gguf_pooled", "rope_parameters"}  # GGUF files have those that mean nothing here
        for key in ("is_decoder", "add_cross_attention"):
            if fields.flag(key):
                raise fields.fail(key, f"but only encoders are supported as {architecture}")
        if fields.raw("position_embedding_type") not in (None, "absolute"):
            raise fields.fail("position_embedding_type", "but only 'absolute' is supported")
        activation = read_activation(fields, "gelu")
        positions = fields.integer("max_position_embeddings", 2, LONGEST)
        sizes = encoder_sizes(fields, positions if padding is None else positions - padding - 1)
        norm = read_norm(fields, "layer_norm_eps", 1e-12, centred=True, bias=True)
        segments = fields.integer("type_vocab_size", 0, 2**16)
        attention = attention_of(sizes, None, qkv_bias=True, o_bias=True, bidirectional=True)
        mlp = MlpSpec(read_width(fields), activation, gated=False, bias=True)
        entry = EntrySpec(positions, segments, norm, padding)

        def layer(number: int) -> LayerSpec:
            sums = Norms(of_sum=norm)
            return LayerSpec(attention, mlp, sums, sums, entry=None if number else entry)

        return model(fields, architecture, sizes, layer, None)


class Roberta(Bert):
    """Positions are counted from behind the padding token's; the classifier's dense layer is a part of it."""

    architectures = {_ROBERTA: "roberta", _XLM: "xlm-roberta", _CAMEMBERT: "camembert"}
    gguf = ()
    names = Names(
        hf={
            **_NAMES,
            **with_biases({"classifier.dense": "pooler", "classifier.out_proj": "classifier"}),
            **unread("pooler.dense", "lm_head", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
        },
        hf_prefixes=("roberta.",),
    )
    defaults = {
        name: {
            **_SIZES,
            "max_position_embeddings": 512,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }
        for name in architectures
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        padding = fields.integer("pad_token_id", 0, LONGEST)
        if padding + 1 >= fields.integer("max_position_embeddings", 2, LONGEST):
            raise fields.fail("pad_token_id", "but positions are counted from behind it")
        return self._config(fields, architecture, padding)


def encoder_sizes(fields: Fields, max_position: int) -> Sizes:
    """Return the sizes of an encoder whose heads divide its width."""
    hidden, heads = fields.integer("hidden_size", 1, 2**20), fields.integer("num_attention_heads", 1, 2**16)
    if hidden % heads:
        raise fields.fail("hidden_size", f"but must be a multiple of num_attention_heads ({heads})")
    layers, vocab = fields.integer("num_hidden_layers", 1, 4096), fields.integer("vocab_size", 1, 2**24)
    return Sizes(layers, hidden, heads, heads, hidden // heads, max_position, vocab)


def first_token_classifier(fields: Fields) -> ClassifierSpec:
    """Return the classifier of encoders: a dense layer with tanh, and a matrix, of the first token's state.

    Some GGUF files have been made without the former.
    """
    labels, hidden = read_labels(fields), fields.integer("hidden_size", 1, 2**20)
    there = fields.raw("gguf_pooled")
    layers = tuple(
        DenseSpec(role, width, bias=there is None or f"{role}_bias" in there, function=function)
        for role, width, function in (("pooler", hidden, _TANH), ("classifier", len(labels), _NONE))
        if there is None or role in there
    )
    return ClassifierSpec("cls", layers, labels, read_decision(fields, len(labels)))
