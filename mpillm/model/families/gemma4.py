"""The text models of Gemma 4, dense or with experts beside the MLP: full layers have other heads than windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpillm.errors import ModelError
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    Sizes,
    attention_of,
    model,
    read_activation,
    read_chosen,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
)
from mpillm.model.families.layer_types import FULL, SLIDING, read_window_types
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Rotary
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope import RopeConfig
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, usual_config, window_types
from mpillm.weights.names import AFTER_NORMS, Names
from mpillm.weights.roles import Key

_TEXT, _UNIFIED = "Gemma4ForCausalLM", "Gemma4UnifiedForCausalLM"
_NORM = "layers.{{l}}.{}_feedforward_layernorm{}.weight"

_USUAL = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "bos_token_id": 2,
    "eos_token_id": 1,
}


class Gemma4(Family):
    """Scores are not scaled, v is normed without weights, and each layer multiplies its output by a number.

    Models whose layers have inputs of their own, or use the keys of earlier layers (E2B, E4B), are not supported.
    """

    architectures = {_TEXT: "gemma4_text", _UNIFIED: "gemma4_unified_text"}
    gguf = ("gemma4",)
    tied = True
    names = Names(
        hf={
            **AFTER_NORMS,
            _NORM.format("pre", ""): ("ffn_norm",),
            _NORM.format("post", "_1"): ("shared_post_norm",),
            _NORM.format("pre", "_2"): ("experts_norm",),
            _NORM.format("post", "_2"): ("experts_post_norm",),
            "layers.{l}.router.proj.weight": ("router",),
        },
        hf_stacked={
            "layers.{l}.experts.gate_up_proj": ("gate", "up"),
            "layers.{l}.experts.down_proj": ("down",),
        },
    )
    defaults = {
        _TEXT: {**_USUAL, "hidden_size_per_layer_input": 256},
        _UNIFIED: {**_USUAL, "max_position_embeddings": 262144, "sliding_window": 1024},
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
            if fields.optional_integer(key, 0, LONGEST):
                raise fields.fail(key, "but layers with inputs or with keys of others are not supported")
        if fields.raw("use_bidirectional_attention") == "all":
            raise fields.fail("use_bidirectional_attention", "but only causal attention is supported")
        for key in ("use_double_wide_mlp", "vocab_size_per_layer_input"):  # keys of these models alone
            fields.raw(key)
        activation = read_activation(fields, "gelu_pytorch_tanh", "hidden_activation")
        sizes, norm, bias = read_sizes(fields), read_norm(fields), fields.flag("attention_bias")
        window, same = fields.integer("sliding_window", 1, LONGEST), fields.flag("attention_k_eq_v")
        types = read_window_types(fields, sizes.n_layers, every=6)
        heads = {SLIDING: sizes, FULL: _full_sizes(fields, sizes, types, same)}
        attention = {
            kind: attention_of(
                heads[kind],
                _rotary(fields, heads[kind], kind),
                window if kind == SLIDING else 0,
                scale=1.0,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm=norm,
                v_norm=replace(norm, weights=False),
                v_is_k=same and kind == FULL,
            )
            for kind in set(types)
        }
        dense = MlpSpec(read_width(fields), activation)
        mlp: MlpSpec | ExpertsSpec = dense
        if fields.flag("enable_moe_block"):
            count = fields.integer("num_experts", 1, 2**16)
            mlp = ExpertsSpec(
                count,
                read_width(fields, "moe_intermediate_size"),
                RouterSpec(read_chosen(fields, count, "top_k_experts"), expert_scales=True),
                activation,
                shared=dense,
                apart=norm,
            )
        else:
            fields.read |= {"num_experts", "top_k_experts", "moe_intermediate_size"}

        def layer(number: int) -> LayerSpec:
            return LayerSpec(attention[types[number]], mlp, Norms(norm, norm), Norms(norm, norm), scaled=True)

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
        layers = fields.integer("block_count")
        types, kv_heads = window_types(fields, layers, 6), fields.raw("attention.head_count_kv")
        kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
        first = {kind: types.index(kind) for kind in (FULL, SLIDING) if kind in types}
        if not len(types) == len(kv_heads) == layers or SLIDING not in first:
            raise ModelError(
                f"{fields.path}: the fields {fields.kind}.attention.* do not say what each layer is."
            )
        dims = {
            kind: {
                fields.integer(f"{name}{suffix}")
                for name in ("attention.key_length", "attention.value_length")
            }
            | {fields.integer(f"rope.dimension_count{suffix}")}
            for kind, suffix in ((FULL, ""), (SLIDING, "_swa"))
        }
        if any(len(found) != 1 for found in dims.values()):
            raise ModelError(
                f"{fields.path}: heads of keys and values that differ, or that turn in part, are not supported."
            )
        heads = {kind: kv_heads[number] for kind, number in first.items()}
        config = usual_config(fields, shape_of, head_dim=dims[SLIDING].pop(), kv_heads=heads[SLIDING])
        full, experts = first.get(FULL, 0), fields.integer("expert_count", 0)
        return config | {
            "architectures": [_TEXT],
            "hidden_activation": "gelu_pytorch_tanh",
            "global_head_dim": dims[FULL].pop(),
            "num_global_key_value_heads": heads.get(FULL),
            "attention_k_eq_v": shape_of(Key("v", full)) is None,
            "layer_types": types,
            "sliding_window": fields.integer("attention.sliding_window"),
            "final_logit_softcapping": fields.number("final_logit_softcapping", 0.0),
            "hidden_size_per_layer_input": fields.integer("embedding_length_per_layer_input", 0),
            "num_kv_shared_layers": fields.integer("attention.shared_kv_layers", 0),
            "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0),
            "enable_moe_block": experts > 0,
            "num_experts": experts,
            "top_k_experts": fields.integer("expert_used_count", 0),
            "moe_intermediate_size": fields.integer("expert_feed_forward_length", 0),
        }


def _rotary(fields: Fields, sizes: Sizes, kind: str) -> Rotary:
    """RoPE of a layer type; GGUF files have that of full layers, and the base of windows apart."""
    local = fields.optional_number("rope_local_base_freq", 1.0, 1e30)
    if local is None:
        return read_rotary(fields, sizes, layer_type=kind)
    if kind == SLIDING:
        return Rotary(RopeConfig(local), sizes.head_dim)
    return read_rotary(fields, sizes)


def _full_sizes(fields: Fields, sizes: Sizes, types: list[str], same: bool) -> Sizes:
    """Return the sizes of layers without a window, from two keys or, since transformers 5, a table of such layers.

    An empty table says that they are those of other layers.
    """
    dim = fields.integer("global_head_dim", 2, 2**16)
    kv_heads = fields.optional_integer("num_global_key_value_heads", 1, 2**16) if same else None
    fields.raw("num_global_key_value_heads")
    kv_heads = kv_heads or sizes.n_kv_heads
    table = fields.table("per_layer_config")
    full = {str(number) for number, kind in enumerate(types) if kind == FULL}
    if "per_layer_config" in fields.values:
        given = [table[number] for number in sorted(table)] or [{}]
        if (
            set(table) not in (full, set())
            or any(one != given[0] for one in given)
            or not isinstance(given[0], dict)
        ):
            raise ModelError(
                f"{fields.name}: per_layer_config must say the same of all full_attention layers."
            )
        own = Fields(given[0], f"{fields.name}, per_layer_config")
        dim = own.integer("head_dim", 2, 2**16, default=sizes.head_dim)
        kv_heads = own.integer("num_key_value_heads", 1, 2**16, default=sizes.n_kv_heads)
    if dim % 2 or sizes.n_heads % kv_heads:
        raise ModelError(
            f"{fields.name}: full_attention layers have {kv_heads} KV heads of {dim} dimensions for "
            f"{sizes.n_heads} heads, which is not possible."
        )
    return replace(sizes, head_dim=dim, n_kv_heads=kv_heads)
