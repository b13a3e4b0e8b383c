"""Falcon-H1: attention and Mamba-2 beside each other in every layer, with muP's multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpillm.kernels.types import Activation
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    attention_of,
    model,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
    require_silu,
)
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
from mpillm.model.layers.beside import BesideSpec
from mpillm.model.layers.mamba2 import Scales
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, refuse_experts, usual_config
from mpillm.weights.names import Names, RowGroups
from mpillm.weights.roles import Key

_FALCON = "FalconH1ForCausalLM"


class FalconH1(Family):
    """In GGUF files the multipliers have been applied to the weights."""

    architectures = {_FALCON: "falcon_h1"}
    gguf = ("falcon-h1",)
    names = Names(
        hf={
            **hf_names("mamba"),
            **FEED_FORWARD,
            "layers.{l}.pre_ff_layernorm.weight": ("ffn_norm",),
            "final_layernorm.weight": ("final_norm",),
        },
        gguf={**GGUF_NAMES, "blk.{l}.ffn_norm": ("ffn_norm",)},  # llama.cpp's converter writes no ".weight"
    )
    defaults = {
        _FALCON: {
            **USUAL,
            **SMALL_BOS,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "mamba_d_ssm": 1024,
            "mamba_norm_before_gate": True,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        require_silu(fields)
        sizes, norm = read_sizes(fields), read_norm(fields)

        def factor(key: str) -> float:
            return fields.number(key, -1e9, 1e9, default=1.0)

        ssm_in, attention_in = factor("ssm_in_multiplier"), factor("attention_in_multiplier")
        gate, down = _factors(fields, "mlp_multipliers", 2)
        bias = fields.flag("attention_bias")
        if bias and attention_in != 1.0:
            raise fields.fail("attention_bias", "which is not supported beside attention_in_multiplier")
        if ssm_in == 0.0 and fields.flag("mamba_proj_bias"):
            raise fields.fail("ssm_in_multiplier", "which is not supported beside mamba_proj_bias")
        mamba = read_mamba(
            fields,
            {**USUAL_KEYS, "out_bias": "projectors_bias"},
            _inner(fields.values, sizes.hidden),
            norm if fields.flag("mamba_rms_norm") else None,
            gate_first=not fields.flag("mamba_norm_before_gate"),
            scales=Scales(*(ssm_in * each for each in _factors(fields, "ssm_multipliers", 5))),
            bias_scale=1 / ssm_in if ssm_in else 1.0,
        )
        fields.read |= {"mamba_expand", "mamba_d_ssm", "mamba_use_mlp"}
        # Products are linear: what multiplies the input multiplies scores twice, and what attention makes once.
        attention = attention_of(
            sizes,
            read_rotary(fields, sizes),
            scale=sizes.head_dim**-0.5 * attention_in**2 * factor("key_multiplier"),
            qkv_bias=bias,
            o_bias=bias,
        )
        mixer = BesideSpec(
            (
                (mamba, factor("ssm_out_multiplier")),
                (attention, attention_in * factor("attention_out_multiplier")),
            )
        )
        mlp = MlpSpec(read_width(fields), Activation.SILU_SCALED, bias=fields.flag("mlp_bias"), alpha=gate)
        layer = LayerSpec(mixer, mlp, Norms(norm), Norms(norm), mlp_scale=down)
        return model(
            fields,
            architecture,
            sizes,
            lambda number: layer,
            norm,
            embedding_scale=factor("embedding_multiplier"),
            logit_scale=factor("lm_head_multiplier"),
        )

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        hidden = config.get("hidden_size")
        return mamba_rows(config, USUAL_KEYS, _inner(config, hidden if type(hidden) is int else 1))

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        mamba = gguf_mamba(fields, USUAL_KEYS)
        return {
            **usual_config(fields, shape_of),
            **mamba,
            "architectures": [_FALCON],
            "mamba_d_ssm": mamba["mamba_n_heads"] * mamba["mamba_d_head"],
            "mamba_rms_norm": shape_of(Key("mamba_norm", 0)) is not None,
            "mamba_norm_before_gate": False,
        }


def _inner(config: Mapping[str, Any], hidden: int) -> int:
    """Return the columns of the Mamba-2 part: mamba_d_ssm, or mamba_expand times the hidden size if that is null."""
    inner = config.get("mamba_d_ssm", 1024)
    if type(inner) is int:
        return inner
    expand = config.get("mamba_expand", USUAL["mamba_expand"])
    return hidden * expand if type(expand) is int else hidden


def _factors(fields: Fields, key: str, count: int) -> tuple[float, ...]:
    """Return `count` multipliers, all 1 if the key is absent or null."""
    values = fields.raw(key)
    if values is None:
        return (1.0,) * count
    if (
        not isinstance(values, list)
        or len(values) != count
        or any(type(v) not in {int, float} for v in values)
    ):
        raise fields.fail(key, f"but must be a list of {count} numbers")
    return tuple(map(float, values))
