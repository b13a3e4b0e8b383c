"""Llama 2 and 3, and what GGUF files call "llama": Mistral, Mixtral, and Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from mpillm.errors import ModelError
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
    refuse_qk_norm,
)
from mpillm.model.families.layer_types import read_windows
from mpillm.model.fields import Fields
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
from mpillm.weights.roles import Key


class Llama(Family):
    """Pre-norm layers of grouped-query attention and a gated MLP with SiLU."""

    architectures = {"LlamaForCausalLM": "llama"}
    model_types = {"internlm3": "LlamaForCausalLM", "iquestcoder": "LlamaForCausalLM"}
    gguf = ("llama",)
    names = Names(rope_pairs=True)
    defaults = {"LlamaForCausalLM": {"max_position_embeddings": 2048, **SMALL_BOS}}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width = read_sizes(fields), read_width(fields)
        windows = read_windows(fields, architecture, sizes.n_layers, 0, 0, some=False)
        attention_bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
        if fields.raw("model_type") == "internlm3":
            attention_bias, mlp_bias = fields.flag("qkv_bias", attention_bias), fields.flag("bias", mlp_bias)
            if attention_bias != mlp_bias:
                raise fields.fail("qkv_bias", "but must be as bias is")
        norm, rotary = read_norm(fields), read_rotary(fields, sizes)
        refuse_qk_norm(fields, architecture, has=False)
        attention = attention_of(
            sizes,
            rotary,
            qkv_bias=attention_bias,
            o_bias=attention_bias,
        )
        assert not any(windows)
        layer = LayerSpec(attention, MlpSpec(width, activation, bias=mlp_bias), Norms(norm), Norms(norm))
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        config = usual_config(fields, shape_of)
        if fields.integer("expert_count", 0):
            return config | _mixtral(fields)
        window = fields.integer("attention.sliding_window", 0)
        present = {role for role in _ATTENTION + _MLP if shape_of(Key(role, 0)) is not None}
        if window:
            refuse_experts(fields)
            return config | {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": window,
                **_biases(present, fields),
            }
        refuse_window(fields)
        refuse_experts(fields)
        if present & set(_ATTENTION) == set(_ATTENTION[:3]):  # Llama with biases on q, k and v alone
            return config | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **_biases(present, fields),
        }


_ATTENTION = ("q_bias", "k_bias", "v_bias", "o_bias")
_MLP = ("gate_bias", "up_bias", "down_bias")


def _biases(present: set[str], fields: GgufFields) -> dict[str, Any]:
    """Read whether there are biases from the tensors: the metadata do not say it."""
    result: dict[str, Any] = {}
    for name, roles in (("attention_bias", set(_ATTENTION)), ("mlp_bias", set(_MLP))):
        if present & roles and not roles <= present:
            raise ModelError(
                f"{fields.path} has {', '.join(sorted(present & roles))} without the other biases of its kind."
            )
        if present & roles:
            result[name] = True
    return result


def _mixtral(fields: GgufFields) -> dict[str, Any]:
    width = fields.integer("expert_feed_forward_length", 0)
    if width not in {0, fields.integer("feed_forward_length")}:
        raise ModelError(
            f"{fields.path}: {fields.kind}.expert_feed_forward_length is not feed_forward_length."
        )
    if fields.raw("expert_weights_norm") is False:
        raise ModelError(f"{fields.path}: {fields.kind}.expert_weights_norm is off, which is not supported.")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": fields.integer("expert_count"),
        "num_experts_per_tok": fields.integer("expert_used_count", 0),
        "sliding_window": fields.integer("attention.sliding_window", 0) or None,
    }
