"""Falcon 7B, 40B, 180B and 2: attention beside the MLP, with few heads of keys and values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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

_FALCON = "FalconForCausalLM"
_NAMES: dict[str, Roles] = {
    "h.{l}.self_attention.query_key_value": ("q", "k", "v"),
    "h.{l}.self_attention.dense": ("o",),
    "h.{l}.mlp.dense_h_to_4h": ("up",),
    "h.{l}.mlp.dense_4h_to_h": ("down",),
    "h.{l}.input_layernorm": ("attn_norm",),
    "h.{l}.ln_attn": ("attn_norm",),
    "h.{l}.post_attention_layernorm": ("ffn_norm",),
    "h.{l}.ln_mlp": ("ffn_norm",),
    "ln_f": ("final_norm",),
}


class Falcon(Family):
    """q, k and v lie in one matrix, head of keys by head of keys; the MLP may have a norm of its own.

    In GGUF files those of all heads lie together. The key "gguf_rows" says so.
    """

    architectures = {_FALCON: "falcon"}
    gguf = ("falcon",)
    tied = True
    names = Names(
        hf={
            "word_embeddings.weight": ("embed",),
            **with_bias(_NAMES),
        },
        hf_prefixes=("transformer.",),
    )
    defaults = {
        _FALCON: {
            "max_position_embeddings": 2048,
            "layer_norm_epsilon": 1e-5,
            "multi_query": True,
            "parallel_attn": True,
            "bos_token_id": 11,
            "eos_token_id": 11,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "gelu", "activation")
        sizes, bias = read_sizes(fields), fields.flag("bias")
        newer = fields.flag("new_decoder_architecture")
        sizes = replace(sizes, n_kv_heads=_kv_heads(fields.values, sizes.n_heads))
        if sizes.n_heads % sizes.n_kv_heads:
            raise fields.fail("num_kv_heads", f"but must divide num_attention_heads ({sizes.n_heads})")
        fields.read |= {"num_kv_heads", "multi_query", "gguf_rows"}
        norm = read_norm(fields, "layer_norm_epsilon", 1e-5, centred=True, bias=True)
        parallel = fields.flag("parallel_attn")
        if newer and not parallel:
            raise fields.fail("parallel_attn", "but must be true with new_decoder_architecture")
        count = fields.integer("num_ln_in_parallel_attn", 1, 2, default=2 if newer else 1)
        own = not parallel or (newer and count == 2)
        width = fields.integer("ffn_hidden_size", 1, 2**24, default=4 * sizes.hidden)
        fields.raw("apply_residual_connection_post_layernorm")  # transformers does not look at it
        layer = LayerSpec(
            attention_of(sizes, read_rotary(fields, sizes), qkv_bias=bias, o_bias=bias),
            MlpSpec(width, activation, gated=False, bias=bias),
            Norms(norm),
            Norms(norm) if own else Norms(),
            parallel=parallel,
        )
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_names(self, tensors: Collection[str]) -> Names:
        """If attention has a norm of its own, that is the second norm, and the first is the MLP's."""
        if "blk.0.attn_norm_2.weight" not in tensors:
            return self.names
        norms = {"blk.{l}.attn_norm": ("ffn_norm",), "blk.{l}.attn_norm_2": ("attn_norm",)}
        return replace(self.names, gguf={**self.names.gguf, **with_bias(norms)})

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        refuse_window(fields)
        config = usual_config(fields, shape_of, ("layer_norm_epsilon", "layer_norm_epsilon"))
        width, kv_heads = config.pop("intermediate_size"), config["num_key_value_heads"]
        two_norms = shape_of(Key("ffn_norm", 0)) is not None
        del config["hidden_act"]
        return config | {
            "architectures": [_FALCON],
            "ffn_hidden_size": width,
            "num_kv_heads": kv_heads,
            "new_decoder_architecture": two_norms or kv_heads > 1,
            "num_ln_in_parallel_attn": 2 if two_norms else 1,
            "gguf_rows": True,
        }

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        if config.get("gguf_rows") or type(hidden) is not int or type(heads) is not int or heads < 1:
            return {}
        size = hidden // heads
        rows = heads // max(_kv_heads(config, heads), 1) * size, size, size
        return {("q", "k", "v"): rows, ("q_bias", "k_bias", "v_bias"): rows}


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """Return the number of heads of keys and values."""
    if config.get("new_decoder_architecture") is True:
        count = config.get("num_kv_heads")
        return count if type(count) is int and count > 0 else heads
    return heads if config.get("multi_query") is False else 1
