"""Mamba-2 alone: layers that have nothing but that mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import Family, Sizes, model, read_activation, read_norm
from mpillm.model.families.mamba import hf_names, mamba_rows, read_mamba
from mpillm.model.fields import Fields
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.weights.names import Names, RowGroups

_MAMBA = "Mamba2ForCausalLM"
_KEYS = {
    "heads": "num_heads",
    "head_dim": "head_dim",
    "groups": "n_groups",
    "state": "state_size",
    "taps": "conv_kernel",
    "conv_bias": "use_conv_bias",
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
    names = Names(
        hf={
            **hf_names("mixer"),
            "layers.{l}.norm.weight": ("attn_norm",),
            "embeddings.weight": ("embed",),
            "norm_f.weight": ("final_norm",),
        },
        hf_prefixes=("backbone.", "model."),
    )
    defaults = {_MAMBA: {**_USUAL, "bos_token_id": 0, "eos_token_id": 2}}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        read_activation(fields, "silu", "swish")
        norm = read_norm(fields, "layer_norm_epsilon", 1e-5)
        hidden = fields.integer("hidden_size", 1, 2**20)
        mixer = read_mamba(fields, _KEYS, hidden * fields.integer("expand", 1, 2**10), norm)
        n_layers, vocab = fields.integer("num_hidden_layers", 1, 4096), fields.integer("vocab_size", 1, 2**24)
        fields.read |= {"layer_types", "intermediate_size", "norm_before_gate", "rms_norm"}
        layer = LayerSpec(mixer, None, Norms(norm), Norms())
        sizes = Sizes(n_layers, hidden, mixer.n_heads, mixer.n_heads, mixer.dv, _LONGEST, vocab)
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        sizes = [config.get(key, _USUAL.get(key, 1)) for key in ("hidden_size", "expand")]
        hidden, expand = (size if type(size) is int else 1 for size in sizes)
        return mamba_rows({**_USUAL, **config}, _KEYS, hidden * expand)
