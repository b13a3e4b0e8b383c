"""dots.llm1: norms of each head's q and k, and after some dense layers experts that a sigmoid chooses."""

from __future__ import annotations

from dataclasses import replace
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
)
from mpillm.model.families.layer_types import read_layer_types, read_windows
from mpillm.model.families.routed import read_routed_experts
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_gating,
    refuse_window,
    routed_config,
    usual_config,
)
from mpillm.weights.names import Names
from mpillm.weights.roles import Key

_HY3 = "HYV3ForCausalLM"


class Dots(Family):
    """Qwen 3's attention and DeepSeek V3's experts; Hunyuan 3 has other names and keys for them."""

    architectures = {"Dots1ForCausalLM": "dots1", _HY3: "hy_v3"}
    gguf = ("dots1", "hy_v3")
    names = Names(
        hf={
            "layers.{l}.mlp.router.gate.weight": ("router",),
            "layers.{l}.mlp.expert_bias": ("router_correction",),
            "layers.{l}.mlp.shared_mlp.gate_proj.weight": ("shared_gate",),
            "layers.{l}.mlp.shared_mlp.up_proj.weight": ("shared_up",),
            "layers.{l}.mlp.shared_mlp.down_proj.weight": ("shared_down",),
        }
    )
    defaults = {
        _HY3: {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 11158840.0,
            "num_experts": 192,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
        },
        "Dots1ForCausalLM": {
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "sliding_window": 4096,
            "max_window_layers": 62,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        if architecture == _HY3:
            return _hunyuan3(fields)
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias = fields.flag("attention_bias")
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        first_window = fields.integer("max_window_layers", 0, LONGEST)
        windows = read_windows(fields, architecture, sizes.n_layers, window, first_window, some=True)
        experts, first = (
            read_routed_experts(fields, activation, shared=0),
            fields.integer("first_k_dense_replace", 0, LONGEST, 0),
        )
        rotary = read_rotary(fields, sizes)

        def layer(number: int) -> LayerSpec:
            attention = attention_of(sizes, rotary, windows[number], qkv_bias=bias, o_bias=bias, qk_norm=norm)
            mlp = experts if number >= first else MlpSpec(width, activation)
            return LayerSpec(attention, mlp, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        refuse_gating(fields)
        config = usual_config(fields, shape_of) | routed_config(fields)
        if fields.kind == "hy_v3":
            return _hunyuan3_gguf(fields, shape_of, config)
        return config | {"architectures": ["Dots1ForCausalLM"], "sliding_window": None}


def _hunyuan3(fields: Fields) -> ModelConfig:
    activation = read_activation(fields)
    sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
    bias = fields.flag("attention_bias")
    dense = MlpSpec(width, activation, bias=fields.flag("mlp_bias"))
    experts = read_routed_experts(
        fields,
        activation,
        shared_key="num_shared_experts",
        scale_key="router_scaling_factor",
        normalise=True,
    )
    if dense.bias and experts.shared:
        experts = replace(experts, shared=replace(experts.shared, bias=True))
    kinds = read_layer_types(fields, sizes.n_layers, "dense", "sparse", key="mlp_layer_types")
    kinds = kinds or ["dense", *["sparse"] * (sizes.n_layers - 1)]
    fields.read |= {"enable_moe_fp32_combine", "first_k_dense_replace"}  # the sum is of float32 here anyway
    rotary = read_rotary(fields, sizes)
    attention = attention_of(sizes, rotary, qkv_bias=bias, o_bias=bias, qk_norm=norm)

    def layer(number: int) -> LayerSpec:
        mlp = dense if kinds[number] == "dense" else experts
        return LayerSpec(attention, mlp, Norms(norm), Norms(norm))

    return model(fields, _HY3, sizes, layer, norm)


def _hunyuan3_gguf(fields: GgufFields, shape_of: ShapeOf, config: dict[str, Any]) -> dict[str, Any]:
    """Find the layers with experts from the tensors alone, and the number of shared experts from their width."""
    shared, width = fields.integer("expert_shared_feed_forward_length", 0), config["moe_intermediate_size"]
    layers = range(config["num_hidden_layers"])
    kinds = ["dense" if shape_of(Key("router", layer)) is None else "sparse" for layer in layers]
    for key in ("first_k_dense_replace", "norm_topk_prob", "n_shared_experts"):
        del config[key]
    return config | {
        "architectures": [_HY3],
        "num_experts": config.pop("n_routed_experts"),
        "num_shared_experts": shared // width if shared else 1,
        "router_scaling_factor": config.pop("routed_scaling_factor"),
        "mlp_layer_types": kinds,
    }
