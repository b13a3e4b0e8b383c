"""Mamba-2 alone: layers that have nothing but that mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpillm.errors import ModelError
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import Family, Sizes, model, read_norm, require_silu
from mpillm.model.families.mamba import GGUF_NAMES, gguf_mamba, hf_names, mamba_rows, read_mamba
from mpillm.model.fields import Fields
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, special_tokens
from mpillm.weights.names import Names, RowGroups
from mpillm.weights.roles import Key

_MAMBA = "Mamba2ForCausalLM"
_KEYS = {
    "heads": "num_heads",
    "head_dim": "head_dim",
    "groups": "n_groups",
    "state": "state_size",
    "taps": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_USUAL = {
    "num_heads": 128,
    "head_dim": 64,
    "n_groups": 8,
    "state_size": 128,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "expand": 2,
}
_LONGEST = 2**20  # there are no positions; what llama.cpp's converter writes


class Mamba2Family(Family):
    """Mamba-2 as state-spaces and Codestral Mamba have it."""

    architectures = {_MAMBA: "mamba2"}
    gguf = ("mamba2",)
    names = Names(
        hf={
            **hf_names("mixer"),
            "layers.{l}.norm.weight": ("attn_norm",),
            "embeddings.weight": ("embed",),
            "norm_f.weight": ("final_norm",),
        },
        gguf=GGUF_NAMES,
        hf_prefixes=("backbone.", "model."),
    )
    defaults = {_MAMBA: {**_USUAL, "bos_token_id": 0, "eos_token_id": 2}}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        require_silu(fields)
        norm = read_norm(fields, "layer_norm_epsilon", 1e-5)
        hidden = fields.integer("hidden_size", 1, 2**20)
        mixer = read_mamba(fields, _KEYS, hidden * fields.integer("expand", 1, 2**10), norm)
        n_layers, vocab = fields.integer("num_hidden_layers", 1, 4096), fields.integer("vocab_size", 1, 2**24)
        fields.read |= {"layer_types", "intermediate_size", "norm_before_gate", "rms_norm", "rope_parameters"}
        layer = LayerSpec(mixer, None, Norms(norm), Norms())
        sizes = Sizes(n_layers, hidden, mixer.n_heads, mixer.n_heads, mixer.dv, _LONGEST, vocab)
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        sizes = [config.get(key, _USUAL.get(key, 1)) for key in ("hidden_size", "expand")]
        hidden, expand = (size if type(size) is int else 1 for size in sizes)
        return mamba_rows({**_USUAL, **config}, _KEYS, hidden * expand)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        embed, hidden = shape_of(Key("embed")), fields.integer("embedding_length")
        mamba = gguf_mamba(fields, _KEYS)
        inner = mamba["num_heads"] * mamba["head_dim"]
        if embed is None or hidden < 1 or inner % hidden:
            raise ModelError(
                f"{fields.path}: ssm.inner_size, {inner}, is no multiple of {hidden} embeddings."
            )
        for key in (
            "context_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
        ):
            fields.raw(key)  # there are none
        return {
            **mamba,
            "architectures": [_MAMBA],
            "hidden_size": hidden,
            "expand": inner // hidden,
            "num_hidden_layers": fields.integer("block_count"),
            "vocab_size": embed[0],
            "layer_norm_epsilon": fields.number("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "tie_word_embeddings": shape_of(Key("head")) is None,
            **special_tokens(fields.metadata),
        }
