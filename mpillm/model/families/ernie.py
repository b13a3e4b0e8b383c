"""ERNIE 4.5, dense or with experts: RoPE of neighbouring dimensions."""

from __future__ import annotations

from typing import Any

from mpillm.kernels.types import Activation
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    attention_of,
    model,
    read_activation,
    read_chosen,
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
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    routed_config,
    usual_config,
)
from mpillm.weights.names import Names

_DENSE, _MIXTURE = "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM"
_USUAL = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, **SMALL_BOS}


class Ernie(Family):
    """The router adds a correction to the softmax to choose experts, and divides their weights by the sum."""

    architectures = {_DENSE: "ernie4_5", _MIXTURE: "ernie4_5_moe"}
    gguf = ("ernie4_5", "ernie4_5-moe")
    tied = True
    names = Names(
        hf={"layers.{l}.mlp.moe_statics.e_score_correction_bias": ("router_correction",)},
    )
    defaults = {
        _DENSE: {**_USUAL, "num_key_value_heads": 2, "head_dim": 128},
        _MIXTURE: {
            **_USUAL,
            "num_key_value_heads": 4,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_intermediate_size": 1536,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias = fields.flag("use_bias")
        attention = attention_of(
            sizes, read_rotary(fields, sizes, interleaved=True), qkv_bias=bias, o_bias=bias
        )
        dense = LayerSpec(attention, MlpSpec(width, activation, bias=bias), Norms(norm), Norms(norm))
        if architecture == _DENSE:
            return model(fields, architecture, sizes, lambda number: dense, norm)
        mixture = LayerSpec(attention, _experts(fields, activation, bias), Norms(norm), Norms(norm))
        first, every = (
            fields.integer("moe_layer_start_index", 0, LONGEST, default=1),
            fields.integer("moe_layer_interval", 1, LONGEST, default=1),
        )
        last = fields.integer("moe_layer_end_index", -1, LONGEST, default=-1)
        last = sizes.n_layers - 1 if last == -1 else last

        def layer(number: int) -> LayerSpec:
            return mixture if first <= number <= last and (number + 1) % every == 0 else dense

        return model(fields, architecture, sizes, layer, norm, head_bias=bias)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        config = usual_config(fields, shape_of)
        if fields.kind == "ernie4_5":
            refuse_experts(fields)
            return config | {"architectures": [_DENSE]}
        fields.integer("expert_shared_feed_forward_length", 0)  # the length of all shared experts together
        routed = routed_config(fields)
        return config | {
            "architectures": [_MIXTURE],
            "moe_num_experts": routed["n_routed_experts"],
            "moe_k": routed["num_experts_per_tok"],
            "moe_intermediate_size": routed["moe_intermediate_size"],
            "moe_num_shared_experts": routed["n_shared_experts"],
            "moe_layer_start_index": routed["first_k_dense_replace"],
            "moe_layer_interval": fields.integer("interleave_moe_layer_step", 1) or 1,
        }


def _experts(fields: Fields, activation: Activation, bias: bool) -> ExpertsSpec:
    count = fields.integer("moe_num_experts", 1, 2**16)
    width = read_width(fields, "moe_intermediate_size")
    fields.number("moe_norm_min", 0, 1e-6, default=1e-12)  # sums of softmaxes are larger
    shared = fields.integer("moe_num_shared_experts", 0, 2**16, default=2)
    return ExpertsSpec(
        count,
        width,
        RouterSpec(read_chosen(fields, count, "moe_k"), correction=True),
        activation,
        MlpSpec(width * shared, activation, bias=bias, prefix="shared_") if shared else None,
    )
