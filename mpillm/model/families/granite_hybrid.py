"""Granite 4: Mamba-2 in most layers, attention in the others; dense, or with experts beside a shared MLP.

Bamba, its forerunner, has a part of RoPE in its attention, and no multipliers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    attention_of,
    model,
    read_chosen,
    read_norm,
    read_partial_rotary,
    read_sizes,
    read_width,
    require_silu,
)
from mpillm.model.families.granite import MULTIPLIERS
from mpillm.model.families.layer_types import FULL, read_layer_types
from mpillm.model.families.mamba import (
    FEED_FORWARD,
    GGUF_NAMES,
    USUAL,
    USUAL_KEYS,
    gguf_mamba,
    hf_names,
    mamba_rows,
    read_mamba,
)
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Rotary
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, usual_config
from mpillm.weights.names import Names, RowGroups
from mpillm.weights.roles import Key

_GRANITE, _BAMBA = "GraniteMoeHybridForCausalLM", "BambaForCausalLM"
_MAMBA = ("mamba", "linear_attention")  # old and new names of one kind of layer
_ATTENTION = ("attention", FULL)


class GraniteHybrid(Family):
    """llama.cpp calls both granitehybrid; where a file has no experts, its MLPs are no longer called shared."""

    architectures = {_GRANITE: "granitemoehybrid", _BAMBA: "bamba"}
    gguf = ("granitehybrid",)
    names = Names(
        hf={
            **hf_names("mamba"),
            "layers.{l}.block_sparse_moe.router.layer.weight": ("router",),
            "layers.{l}.shared_mlp.input_linear.weight": ("shared_gate", "shared_up"),
            "layers.{l}.shared_mlp.output_linear.weight": ("shared_down",),
            **FEED_FORWARD,
            "layers.{l}.pre_ff_layernorm.weight": ("ffn_norm",),
            "final_layernorm.weight": ("final_norm",),
        },
        hf_stacked={
            "layers.{l}.block_sparse_moe.input_linear.weight": ("gate", "up"),
            "layers.{l}.block_sparse_moe.output_linear.weight": ("down",),
        },
        gguf=GGUF_NAMES,
        rope_pairs=True,
    )
    defaults = {
        _GRANITE: {
            **USUAL,
            **SMALL_BOS,
            "max_position_embeddings": 2048,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 1024,
        },
        _BAMBA: {
            **USUAL,
            **SMALL_BOS,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        require_silu(fields)
        sizes, norm = read_sizes(fields), read_norm(fields)
        mamba = read_mamba(fields, USUAL_KEYS, _inner(fields.values, sizes.hidden), norm)
        fields.raw("mamba_expand")
        bias, types = fields.flag("attention_bias"), _layer_types(fields, architecture, sizes.n_layers)
        scale, residual, embedding, logits = None, 1.0, 1.0, 1.0
        mlp: MlpSpec | ExpertsSpec
        rotary: Rotary | None = None
        if architecture == _BAMBA:
            rotary = read_partial_rotary(fields, sizes, default=0.5)
            mlp = MlpSpec(read_width(fields), bias=fields.flag("mlp_bias"))
        else:
            scale, residual, embedding, logits = (
                fields.number(key, 1e-9, 1e9, default=1.0) for key in MULTIPLIERS
            )
            turns = fields.one_of("position_embedding_type", ("nope", "rope"), default="nope") == "rope"
            mlp = _mlp(fields)
            if turns:
                rotary = read_partial_rotary(fields, sizes, default=1.0)
            fields.read |= {"rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"}
        attention = attention_of(sizes, rotary, scale=scale, qkv_bias=bias, o_bias=bias)
        layers = {
            kind: LayerSpec(mixer, mlp, Norms(norm), Norms(norm), residual)
            for kinds, mixer in ((_MAMBA, mamba), (_ATTENTION, attention))
            for kind in kinds
        }
        return model(
            fields,
            architecture,
            sizes,
            lambda number: layers[types[number]],
            norm,
            embedding_scale=embedding,
            logit_scale=1 / logits,
        )

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        hidden = config.get("hidden_size")
        return mamba_rows(config, USUAL_KEYS, _inner(config, hidden if type(hidden) is int else 1))

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        config = usual_config(fields, shape_of, partial=True)
        layers = range(min(max(config["num_hidden_layers"], 0), 4096))
        names = ("attention.scale", "residual_scale", "embedding_scale", "logit_scale")
        scales = [fields.number(name, 0.0) for name in names]
        scales[0] = scales[0] or config["head_dim"] ** -0.5
        mamba, experts = gguf_mamba(fields, USUAL_KEYS), fields.integer("expert_count", 0)
        shared = fields.integer("expert_shared_feed_forward_length", 0)
        used, up = fields.integer("expert_used_count", 0), shape_of(Key("up", 0))
        turns = fields.raw("rope.scaling.finetuned") is not False  # as in llama.cpp
        return {
            **config,
            **mamba,
            "architectures": [_GRANITE],
            "mamba_inner": mamba["mamba_n_heads"] * mamba["mamba_d_head"],
            "layer_types": [
                _MAMBA[0] if shape_of(Key("mamba_rates", layer)) is not None else _ATTENTION[0]
                for layer in layers
            ],
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "shared_intermediate_size": shared if experts or up is None else up[0],
            "position_embedding_type": "rope" if turns else "nope",
            **{key: scale for key, scale in zip(MULTIPLIERS, scales, strict=True) if scale},
        }


def _inner(config: Mapping[str, Any], hidden: int) -> int:
    """Return the columns of a Mamba-2 layer: mamba_expand times the hidden size, or the number that a GGUF file has."""
    if type(config.get("mamba_inner")) is int:
        return int(config["mamba_inner"])
    expand = config.get("mamba_expand", USUAL["mamba_expand"])
    return hidden * expand if type(expand) is int else hidden


def _layer_types(fields: Fields, architecture: str, n_layers: int) -> Sequence[str]:
    """Return the kind of each layer; Bamba tells the numbers of those with attention."""
    if architecture == _BAMBA:
        attending = fields.integers("attn_layer_indices", 0, 4096)
        return [_ATTENTION[0] if layer in attending else _MAMBA[0] for layer in range(n_layers)]
    key = "layers_block_type" if "layers_block_type" in fields.values else "layer_types"
    types = read_layer_types(fields, n_layers, *_MAMBA, *_ATTENTION, key=key)
    return [_MAMBA[0]] * n_layers if types is None else types


def _mlp(fields: Fields) -> MlpSpec | ExpertsSpec:
    """Return a shared MLP, and perhaps experts beside it."""
    count, width = fields.integer("num_local_experts", 0, 2**16), read_width(fields)
    shared = read_width(fields, "shared_intermediate_size")
    converted = fields.values.get("gguf_weights") is True
    if not count:
        fields.raw("num_experts_per_tok")
        return MlpSpec(shared, prefix="" if converted else "shared_")
    router = RouterSpec(read_chosen(fields, count))
    return ExpertsSpec(count, width, router, shared=MlpSpec(shared, prefix="shared_"))
