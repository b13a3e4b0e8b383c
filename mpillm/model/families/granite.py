"""Granite: Llama with multipliers of embeddings, attention, residuals and logits, dense or with experts."""

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
)
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
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

_DENSE, _MIXTURE, _SHARED = "GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"
_USUAL = {"max_position_embeddings": 2048, **SMALL_BOS}
_EXPERTS = {**_USUAL, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 0}
MULTIPLIERS = "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"
_SCALES = "attention.scale", "residual_scale", "embedding_scale", "logit_scale"  # the same in GGUF files


class Granite(Family):
    """Granite 3 and later; a mixture's experts are as wide as a dense MLP would be."""

    architectures = {_DENSE: "granite", _MIXTURE: "granitemoe", _SHARED: "granitemoeshared"}
    gguf = ("granite", "granitemoe")
    names = Names(
        hf={
            "layers.{l}.block_sparse_moe.router.layer.weight": ("router",),
            "layers.{l}.shared_mlp.input_linear.weight": ("shared_gate", "shared_up"),
            "layers.{l}.shared_mlp.output_linear.weight": ("shared_down",),
        },
        hf_stacked={
            "layers.{l}.block_sparse_moe.input_linear.weight": ("gate", "up"),
            "layers.{l}.block_sparse_moe.output_linear.weight": ("down",),
        },
        rope_pairs=True,
    )
    defaults = {_DENSE: _USUAL, _MIXTURE: _EXPERTS, _SHARED: _EXPERTS}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias = fields.flag("attention_bias")
        scale, residual, embedding, logits = (
            fields.number(key, 1e-9, 1e9, default=1.0) for key in MULTIPLIERS
        )
        mlp: MlpSpec | ExpertsSpec
        if architecture == _DENSE:
            mlp = MlpSpec(width, activation, bias=fields.flag("mlp_bias"))
        else:
            count = read_expert_count(fields)
            shared = fields.integer("shared_intermediate_size", 0, 2**24) if architecture == _SHARED else 0
            mlp = ExpertsSpec(
                count,
                width,
                RouterSpec(read_chosen(fields, count)),
                activation,
                MlpSpec(shared, activation, prefix="shared_") if shared else None,
            )
        rotary = read_rotary(fields, sizes)
        attention = attention_of(sizes, rotary, scale=scale, qkv_bias=bias, o_bias=bias)
        layer = LayerSpec(attention, mlp, Norms(norm), Norms(norm), residual)
        return model(
            fields,
            architecture,
            sizes,
            lambda number: layer,
            norm,
            embedding_scale=embedding,
            logit_scale=1 / logits,
        )

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        config = usual_config(fields, shape_of)
        config["architectures"] = [_DENSE]
        if fields.kind == "granitemoe":
            config |= {
                "architectures": [_SHARED],
                "num_local_experts": fields.integer("expert_count"),
                "num_experts_per_tok": fields.integer("expert_used_count"),
                "shared_intermediate_size": fields.integer("expert_shared_feed_forward_length", 0),
            }
        else:
            refuse_experts(fields)
        scales = [fields.number(name, 0.0) for name in _SCALES]
        scales[0] = scales[0] or config["head_dim"] ** -0.5  # as llama.cpp, not as transformers
        return config | {key: scale for key, scale in zip(MULTIPLIERS, scales, strict=True) if scale}
