"""Gemma, Gemma 2 and the text models of Gemma 3: GeGLU, from 2 on norms before and after and windows in most layers."""

from __future__ import annotations

from typing import Any

from mpillm.errors import ModelError
from mpillm.kernels.types import Activation
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    Sizes,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.families.layer_types import FULL, SLIDING, read_window_types
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Rotary
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope import RopeConfig
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    usual_config,
    window_types,
)
from mpillm.weights.names import AFTER_NORMS, Names

_GEMMA, _GEMMA2, _GEMMA3 = "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"
_EMBEDDING, _VAULT = "Gemma3TextModel", "VaultGemmaForCausalLM"
_USUAL = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


class FirstGemma(Family):
    """Llama's layers, with norms' weights and embeddings as in all of Gemma."""

    architectures = {_GEMMA: "gemma"}
    gguf = ("gemma",)
    tied = True
    defaults = {
        _GEMMA: {
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "bos_token_id": 2,
            "eos_token_id": 1,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        fields.raw("hidden_activation")  # some files have it besides, and transformers does not look at it
        activation = read_activation(fields, "gelu_pytorch_tanh")
        if activation == Activation.GELU:  # what old files say, for the approximation that was trained with
            activation = Activation.GELU_TANH
        sizes, width, bias = read_sizes(fields), read_width(fields), fields.flag("attention_bias")
        norm = read_norm(fields, offset=0.0 if fields.flag("gguf_norms") else 1.0)
        attention = attention_of(
            sizes,
            read_rotary(fields, sizes),
            qkv_bias=bias,
            o_bias=bias,
            bidirectional=fields.flag("use_bidirectional_attention"),
        )
        layer = LayerSpec(attention, MlpSpec(width, activation), Norms(norm), Norms(norm))
        scale = sizes.hidden**0.5
        return model(fields, architecture, sizes, lambda number: layer, norm, embedding_scale=scale)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        refuse_window(fields)
        config = usual_config(fields, shape_of)
        config["hidden_act"] = "gelu_pytorch_tanh"
        return config | {"architectures": [_GEMMA], "gguf_norms": True}


class Gemma(Family):
    """Weights of norms are stored minus one; embeddings are multiplied by the square root of their width.

    VaultGemma is Gemma 2 without norms after attention and MLP.
    """

    architectures = {_GEMMA2: "gemma2", _GEMMA3: "gemma3_text", _VAULT: "vaultgemma"}
    gguf = ("gemma2", "gemma3", "gemma-embedding")
    tied = True
    names = Names(hf={**AFTER_NORMS, "layers.{l}.pre_feedforward_layernorm.weight": ("ffn_norm",)})
    defaults = {
        _GEMMA2: {
            **_USUAL,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _VAULT: {
            **_USUAL,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _GEMMA3: {
            **_USUAL,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        fields.raw("hidden_act")  # older files have it besides, and transformers does not look at it
        activation = read_activation(fields, "gelu_pytorch_tanh", "hidden_activation")
        sizes, width = read_sizes(fields), read_width(fields)
        bias = fields.flag("attention_bias")
        scale = fields.number("query_pre_attn_scalar", 1e-6, 1e9) ** -0.5
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        softcap = fields.optional_number("attn_logit_softcapping", 0, 1e9) or 0.0
        if architecture == _GEMMA3:  # transformers has the key there, and does not look at it
            softcap = 0.0
        # GGUF files have the weights of norms as they are.
        norm = read_norm(fields, offset=0.0 if fields.flag("gguf_norms") else 1.0)
        bidirectional = fields.flag("use_bidirectional_attention")
        if bidirectional and window:  # the window is then that of both sides together (EmbeddingGemma)
            window = window // 2 + 1
        newer = architecture == _GEMMA3
        fields.raw("cache_implementation")
        types = read_window_types(fields, sizes.n_layers, every=6 if newer else 2)
        rotaries = _rotaries(fields, sizes, set(types))
        norms = Norms(norm, None if architecture == _VAULT else norm)

        def layer(number: int) -> LayerSpec:
            attention = attention_of(
                sizes,
                rotaries[types[number]],
                window if types[number] == SLIDING else 0,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm=norm if newer else None,
                softcap=softcap,
                scale=scale,
                bidirectional=bidirectional,
            )
            return LayerSpec(attention, MlpSpec(width, activation), norms, norms)

        return model(
            fields,
            architecture,
            sizes,
            layer,
            norm,
            embedding_scale=sizes.hidden**0.5,
            logit_softcap=fields.optional_number("final_logit_softcapping", 0, 1e9) or 0.0,
        )

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        config = usual_config(fields, shape_of)
        encodes = fields.kind == "gemma-embedding"
        if encodes and fields.raw("attention.causal") is not False:
            raise ModelError(f"{fields.path}: gemma-embedding files are of encoders (attention.causal).")
        for role in ("dense_2", "dense_3"):  # the tensors say so
            for end in ("in", "out"):
                fields.raw(f"{role}_feat_{end}")
        newer = encodes or fields.kind == "gemma3"
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        # What llama.cpp takes for the largest of both: no field says it.
        largest = layers == (62 if newer else 46)
        softcaps = {
            "attn_logit_softcapping": fields.number("attn_logit_softcapping", 0.0 if newer else 50.0),
            "final_logit_softcapping": fields.number("final_logit_softcapping", 0.0 if newer else 30.0),
        }
        return config | {
            "architectures": [_EMBEDDING if encodes else _GEMMA3 if newer else _GEMMA2],
            "use_bidirectional_attention": encodes,
            "gguf_norms": True,
            "query_pre_attn_scalar": config["hidden_size"] // heads if largest else config["head_dim"],
            "sliding_window": fields.integer("attention.sliding_window", 4096),
            "layer_types": window_types(fields, layers, 6 if newer else 2),
            "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0) if newer else None,
            **softcaps,
        }


def _rotaries(fields: Fields, sizes: Sizes, types: set[str]) -> dict[str, Rotary]:
    """RoPE by layer type: Gemma 3 has two, and older files of it name the base of windows apart."""
    parameters = fields.values.get("rope_parameters")
    if isinstance(parameters, dict) and any(isinstance(value, dict) for value in parameters.values()):
        return {kind: read_rotary(fields, sizes, layer_type=kind) for kind in types}
    found = read_rotary(fields, sizes)
    local = fields.optional_number("rope_local_base_freq", 1.0, 1e30)
    if local is None:
        return {FULL: found, SLIDING: found}
    return {FULL: found, SLIDING: Rotary(RopeConfig(local), found.dim)}
