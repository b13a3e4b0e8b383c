"""Granite: Llama with multipliers of embeddings, attention, residuals and logits, dense or with experts.

HyperCLOVA X has them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

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
from mpillm.model.families.layer_types import FULL, SLIDING, read_layer_types
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Rotary
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    usual_config,
    window_types,
)
from mpillm.weights.names import Names
from mpillm.weights.roles import Key

_DENSE, _MIXTURE, _SHARED = "GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"
_CLOVA, _SWA = "HyperCLOVAXForCausalLM", "GraniteSWAForCausalLM"
_USUAL = {"max_position_embeddings": 2048, **SMALL_BOS}
_EXPERTS = {**_USUAL, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 0}
MULTIPLIERS = "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"
_SCALES = "attention.scale", "residual_scale", "embedding_scale", "logit_scale"  # the names in GGUF files


class Granite(Family):
    """Granite 3 and later; a mixture's experts are as wide as a dense MLP would be.

    HyperCLOVA X may have norms after attention and MLP, and multiplies logits.
    """

    architectures = {
        _DENSE: "granite",
        _MIXTURE: "granitemoe",
        _SHARED: "granitemoeshared",
        _CLOVA: "hyperclovax",
    }
    gguf: ClassVar[tuple[str, ...]] = ("granite", "granitemoe")
    names = Names(
        hf={
            "layers.{l}.block_sparse_moe.router.layer.weight": ("router",),
            "layers.{l}.shared_mlp.input_linear.weight": ("shared_gate", "shared_up"),
            "layers.{l}.shared_mlp.output_linear.weight": ("shared_down",),
            "layers.{l}.post_norm1.weight": ("attn_post_norm",),
            "layers.{l}.post_norm2.weight": ("ffn_post_norm",),
        },
        hf_stacked={
            "layers.{l}.block_sparse_moe.input_linear.weight": ("gate", "up"),
            "layers.{l}.block_sparse_moe.output_linear.weight": ("down",),
        },
        rope_pairs=True,
    )
    defaults = {
        _DENSE: _USUAL,
        _MIXTURE: _EXPERTS,
        _SHARED: _EXPERTS,
        _CLOVA: {**_USUAL, "use_post_norm": True},
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias = fields.flag("attention_bias")
        scale, residual, embedding, logits = (
            fields.optional_number(key, 1e-9, 1e9) or 1.0 for key in MULTIPLIERS
        )
        if architecture == _CLOVA:
            scale = fields.optional_number("attention_multiplier", 1e-9, 1e9) or sizes.head_dim**-0.5
            logits = 1 / logits
        mlp: MlpSpec | ExpertsSpec
        if architecture in (_DENSE, _CLOVA, _SWA):
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
        after = norm if architecture == _CLOVA and fields.flag("use_post_norm") else None
        windows: Sequence[int] = (0,) * sizes.n_layers
        rotaries: Sequence[Rotary | None] = (read_rotary(fields, sizes),) * sizes.n_layers
        if architecture == _SWA:
            windows, rotaries = _windows(fields, sizes.n_layers), _by_base(fields, rotaries)

        def layer(number: int) -> LayerSpec:
            attention = attention_of(
                sizes,
                rotaries[number],
                windows[number],
                scale=scale,
                qkv_bias=bias,
                o_bias=bias,
                sinks=architecture == _SWA,
            )
            return LayerSpec(attention, mlp, Norms(norm, after), Norms(norm, after), residual)

        return model(
            fields,
            architecture,
            sizes,
            layer,
            norm,
            embedding_scale=embedding,
            logit_scale=1 / logits,
        )

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        config = usual_config(fields, shape_of)
        config |= {"architectures": [_DENSE], "attention_bias": shape_of(Key("q_bias", 0)) is not None}
        if fields.kind == "granitemoe":
            config |= {
                "architectures": [_SHARED],
                "num_local_experts": fields.integer("expert_count"),
                "num_experts_per_tok": fields.integer("expert_used_count"),
                "shared_intermediate_size": fields.integer("expert_shared_feed_forward_length", 0),
            }
        else:
            refuse_experts(fields)
        return config | _scales(fields, config["head_dim"])


class GraniteSwa(Granite):
    """Windows, sinks, and RoPE with a base of each layer's own (0: none)."""

    architectures = {_SWA: "granite_swa"}
    gguf = ("granite_swa",)
    tied = True
    defaults = {
        _SWA: {
            **_USUAL,
            "num_key_value_heads": 4,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "bos_token_id": 100257,
            "eos_token_id": 100257,
        }
    }

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        """Layers have one base, or none where rope_pattern says false."""
        refuse_experts(fields)
        config = usual_config(fields, shape_of)
        config |= _scales(fields, config["head_dim"])
        layers, turns = config["num_hidden_layers"], fields.raw("attention.rope_pattern")
        if isinstance(turns, list):
            base = fields.number("rope.freq_base", 1e4)
            config["layer_rope_theta"] = [base if turn else 0 for turn in turns]
        elif turns is False:
            config["layer_rope_theta"] = [0] * layers
        return config | {
            "architectures": [_SWA],
            "attention_bias": shape_of(Key("q_bias", 0)) is not None,
            "sliding_window": fields.integer("attention.sliding_window", 0) or None,
            "layer_types": window_types(fields, layers, 0),
        }


def _scales(fields: GgufFields, head_dim: int) -> dict[str, float]:
    """Return the factors of a GGUF file; without one of scores it is what llama.cpp takes, not transformers."""
    scales = [fields.number(name, 0.0) for name in _SCALES]
    scales[0] = scales[0] or head_dim**-0.5
    return {key: scale for key, scale in zip(MULTIPLIERS, scales, strict=True) if scale}


def _windows(fields: Fields, n_layers: int) -> tuple[int, ...]:
    """Return each layer's window: without layer_types every fourth has none, from the first on."""
    window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
    every = [SLIDING if number % 4 else FULL for number in range(n_layers)]
    types = read_layer_types(fields, n_layers, FULL, SLIDING) or every
    return tuple(window if kind == SLIDING else 0 for kind in types)


def _by_base(fields: Fields, rotaries: Sequence[Rotary | None]) -> Sequence[Rotary | None]:
    """Return the layers' RoPE with the bases in layer_rope_theta, if it is there."""
    bases = fields.raw("layer_rope_theta")
    if bases is None:
        return rotaries
    if not isinstance(bases, list) or len(bases) != len(rotaries):
        raise fields.fail("layer_rope_theta", f"but must have a number for each of {len(rotaries)} layers")
    table = Fields(
        {str(number): base for number, base in enumerate(bases)}, f"{fields.name}, layer_rope_theta"
    )
    numbers = [table.number(str(number), 0, 1e30) for number in range(len(bases))]
    return tuple(
        replace(rotary, config=replace(rotary.config, theta=base)) if base and rotary else None
        for rotary, base in zip(rotaries, numbers, strict=True)
    )
