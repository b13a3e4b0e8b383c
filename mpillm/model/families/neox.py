"""GPT-NeoX (Pythia), Phi 1 and 2, StableLM: LayerNorm, RoPE of a part of each head, attention beside the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_partial_rotary,
    read_sizes,
    read_width,
    refuse_qk_norm,
)
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
from mpillm.weights.names import Names, Roles, RowGroups, with_bias
from mpillm.weights.roles import Key

_NEOX, _PHI, _STABLE = "GPTNeoXForCausalLM", "PhiForCausalLM", "StableLmForCausalLM"
_QKV: Roles = ("q", "k", "v")


class NeoX(Family):
    """Attention and the MLP have a norm each, beside each other too. Each head's rows of q, k and v lie together.

    In GGUF files those of all heads do. The key "gguf_rows" says so.
    """

    architectures = {_NEOX: "gpt_neox"}
    gguf = ("gptneox",)
    names = Names(
        hf={
            "embed_in.weight": ("embed",),
            "embed_out.weight": ("head",),
            **with_bias(
                {
                    "layers.{l}.attention.query_key_value": _QKV,
                    "layers.{l}.attention.dense": ("o",),
                    "layers.{l}.mlp.dense_h_to_4h": ("up",),
                    "layers.{l}.mlp.dense_4h_to_h": ("down",),
                    "final_layer_norm": ("final_norm",),
                }
            ),
            "layers.{l}.attention.bias": (),  # the causal mask, which old files have
        },
        hf_prefixes=("gpt_neox.",),
    )
    defaults = {
        _NEOX: {
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "gelu")
        sizes, width, bias = read_sizes(fields), read_width(fields), fields.flag("attention_bias")
        norm = read_norm(fields, "layer_norm_eps", centred=True, bias=True)
        part = fields.number("rotary_pct", 0, 1, default=0.25)
        if (base := fields.optional_number("rotary_emb_base", 1, 1e30)) is not None:
            fields.defaults = {**fields.defaults, "rope_theta": base}
            if fields.number("rope_theta", 1, 1e30) != base:
                raise fields.fail("rope_theta", f"but rotary_emb_base is {base:g}; keep one")
        attention = attention_of(
            sizes, read_partial_rotary(fields, sizes, part, odd=False), qkv_bias=bias, o_bias=bias
        )
        mlp = MlpSpec(width, activation, gated=False, bias=True)
        parallel = fields.flag("use_parallel_residual")
        fields.read |= {"num_key_value_heads", "gguf_rows"}
        layer = LayerSpec(attention, mlp, Norms(norm), Norms(norm), parallel=parallel)
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        return _usual(fields, shape_of) | {
            "architectures": [_NEOX],
            "hidden_act": "gelu",
            "attention_bias": shape_of(Key("o_bias", 0)) is not None,
            "use_parallel_residual": fields.raw("use_parallel_residual") is not False,
            "gguf_rows": True,
        }

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if config.get("gguf_rows") or type(hidden) is not int or type(heads) is not int or heads < 1:
            return {}
        rows = (hidden // heads,) * 3
        return {_QKV: rows, ("q_bias", "k_bias", "v_bias"): rows}


class FirstPhi(Family):
    """One norm for attention and the MLP, which are side by side, and biases everywhere, in the LM head too."""

    architectures = {_PHI: "phi"}
    gguf = ("phi2",)
    names = Names(
        hf=with_bias(
            {
                "layers.{l}.self_attn.dense": ("o",),
                "layers.{l}.mlp.fc1": ("up",),
                "layers.{l}.mlp.fc2": ("down",),
                "final_layernorm": ("final_norm",),
            }
        ),
    )
    defaults = {
        _PHI: {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "gelu_new")
        sizes, width = read_sizes(fields), read_width(fields)
        norm = read_norm(fields, "layer_norm_eps", centred=True, bias=True)
        refuse_qk_norm(fields, architecture, has=False)
        rotary = read_partial_rotary(fields, sizes, default=0.5, odd=False)
        attention = attention_of(sizes, rotary, qkv_bias=True, o_bias=True)
        mlp = MlpSpec(width, activation, gated=False, bias=True)
        layer = LayerSpec(attention, mlp, Norms(norm), Norms(), parallel=True)
        return model(fields, architecture, sizes, lambda number: layer, norm, head_bias=True)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        return _usual(fields, shape_of) | {"architectures": [_PHI], "hidden_act": "gelu_new"}


class StableLm(Family):
    """A gated MLP, biases of q, k and v or none, and perhaps a norm of each head of q and k."""

    architectures = {_STABLE: "stablelm"}
    gguf = ("stablelm",)
    names = Names(
        hf={f"layers.{{l}}.self_attn.{x}_layernorm.norms.{{e}}.weight": (f"{x}_norm",) for x in "qk"}
    )
    defaults = {
        _STABLE: {
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width = read_sizes(fields), read_width(fields)
        norm = read_norm(fields, "layer_norm_eps", centred=True, bias=True)
        rotary = read_partial_rotary(fields, sizes, default=0.25, odd=False)
        by_head = fields.flag("qk_layernorm")
        attention = attention_of(
            sizes,
            rotary,
            qkv_bias=fields.flag("use_qkv_bias"),
            qk_norm=replace(norm, bias=False) if by_head else None,
            qk_norm_by_head=by_head,
        )
        parallel = fields.flag("use_parallel_residual")
        mlp_norms = Norms() if parallel else Norms(norm)
        layer = LayerSpec(attention, MlpSpec(width, activation), Norms(norm), mlp_norms, parallel=parallel)
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        fields.raw("use_parallel_residual")  # true in files of models without it too
        return _usual(fields, shape_of) | {
            "architectures": [_STABLE],
            "use_qkv_bias": shape_of(Key("q_bias", 0)) is not None,
            "qk_layernorm": shape_of(Key("q_norm", 0)) is not None,
            "use_parallel_residual": shape_of(Key("ffn_norm", 0)) is None,
        }


def _usual(fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
    refuse_experts(fields)
    refuse_window(fields)
    return usual_config(fields, shape_of, ("layer_norm_epsilon", "layer_norm_eps"), partial=True)
