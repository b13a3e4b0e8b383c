"""GPT-2, GPT-BigCode (StarCoder, SantaCoder) and OPT: learned positions instead of RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from mpillm.errors import ModelError
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    Sizes,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_sizes,
    read_width,
)
from mpillm.model.fields import Fields
from mpillm.model.layers.entry import EntrySpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, refuse_experts, usual_config
from mpillm.weights.names import Names, Roles, RowGroups, with_bias

_GPT2, _BIGCODE, _OPT = "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "OPTForCausalLM"
_MATRICES: dict[str, Roles] = {
    "h.{l}.attn.c_attn": ("q", "k", "v"),
    "h.{l}.attn.c_proj": ("o",),
    "h.{l}.mlp.c_fc": ("up",),
    "h.{l}.mlp.c_proj": ("down",),
}
_NAMES: dict[str, Roles] = {
    "wte.weight": ("embed",),
    **with_bias(
        {
            "ln_f": ("final_norm",),
            "h.{l}.ln_1": ("attn_norm",),
            "h.{l}.ln_2": ("ffn_norm",),
            **_MATRICES,
        }
    ),
    "h.{l}.attn.bias": (),  # the causal mask, which old files have
    "h.{l}.attn.masked_bias": (),
}
_OPT_NAMES: dict[str, Roles] = {
    "layers.{l}.self_attn.out_proj": ("o",),
    "layers.{l}.self_attn_layer_norm": ("attn_norm",),
    "layers.{l}.final_layer_norm": ("ffn_norm",),
    "layers.{l}.fc1": ("up",),
    "layers.{l}.fc2": ("down",),
    "final_layer_norm": ("final_norm",),
}


class Gpt2(Family):
    """Pre-norm layers with LayerNorm, GELU, and biases everywhere; matrices lie transposed."""

    architectures = {_GPT2: "gpt2"}
    gguf: ClassVar[tuple[str, ...]] = ("gpt2",)
    activation: ClassVar[str] = "gelu_new"
    tied = True
    names = Names(
        hf=_NAMES,
        hf_transposed=frozenset(f"{name}.weight" for name in _MATRICES),
        hf_prefixes=("transformer.",),
    )
    defaults = {
        _GPT2: {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256}
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, self.activation, "activation_function")
        hidden, heads = fields.integer("n_embd", 2, 2**20), fields.integer("n_head", 1, 2**16)
        if hidden % heads:
            raise fields.fail("n_embd", f"but must be a multiple of n_head ({heads})")
        positions = fields.integer("n_positions", 1, LONGEST)
        sizes = Sizes(
            fields.integer("n_layer", 1, 4096),
            hidden,
            heads,
            1 if fields.flag("multi_query") else heads,
            hidden // heads,
            positions,
            fields.integer("vocab_size", 1, 2**24),
        )
        norm = read_norm(fields, "layer_norm_epsilon", 1e-5, centred=True, bias=True)
        scaled, by_layer = (
            fields.flag("scale_attn_weights", default=True),
            fields.flag("scale_attn_by_inverse_layer_idx"),
        )
        width = fields.integer("n_inner", 1, 2**24, default=4 * hidden)
        mlp = MlpSpec(width, activation, gated=False, bias=True)
        attention = attention_of(sizes, None, scale=None if scaled else 1.0, qkv_bias=True, o_bias=True)

        def layer(number: int) -> LayerSpec:
            own = replace(attention, scale=attention.scale / (number + 1)) if by_layer else attention
            return LayerSpec(
                own, mlp, Norms(norm), Norms(norm), entry=EntrySpec(positions) if number == 0 else None
            )

        # The same numbers in another order; and of GGUF files what others read of RoPE.
        fields.read |= {"n_ctx", "reorder_and_upcast_attn", "rope_parameters"}
        return model(fields, architecture, sizes, layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        usual = usual_config(fields, shape_of, ("layer_norm_epsilon", "layer_norm_epsilon"))
        return {
            "architectures": list(self.architectures),
            "n_embd": usual["hidden_size"],
            "n_head": usual["num_attention_heads"],
            "n_layer": usual["num_hidden_layers"],
            "n_inner": usual["intermediate_size"],
            "n_positions": usual["max_position_embeddings"],
            "activation_function": self.activation,
            **{
                key: usual[key]
                for key in ("vocab_size", "layer_norm_epsilon", "bos_token_id", "eos_token_id")
            },
        }


class BigCode(Gpt2):
    """One KV head for all queries, or q, k and v of each head side by side; matrices are not transposed."""

    architectures = {_BIGCODE: "gpt_bigcode"}
    gguf = ("starcoder",)
    activation = "gelu_pytorch_tanh"
    names = Names(hf=_NAMES, hf_prefixes=("transformer.",))
    defaults = {
        _BIGCODE: {
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "multi_query": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        # The same numbers in another precision.
        fields.read |= {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"}
        return super().config(fields, architecture)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        if fields.integer("attention.head_count_kv", 1) != 1:
            raise ModelError(
                f"{fields.path}: {fields.kind} files with more than one head of keys and values are not supported."
            )
        return super().gguf_config(fields, shape_of)

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        hidden, heads = config.get("n_embd"), config.get("n_head")
        if type(hidden) is not int or type(heads) is not int or heads < 1:
            return {}
        size = hidden // heads
        rows = (size if config.get("multi_query") is False else hidden, size, size)
        return {("q", "k", "v"): rows, ("q_bias", "k_bias", "v_bias"): rows}


class Opt(Family):
    """Pre-norm layers with LayerNorm and ReLU; two positions before the first are unused."""

    architectures = {_OPT: "opt"}
    tied = True
    names = Names(
        hf={
            "embed_positions.weight": ("positions",),
            **with_bias(_OPT_NAMES),
        },
        hf_prefixes=("model.decoder.", "decoder."),
    )
    defaults = {
        _OPT: {
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "bos_token_id": 2,
            "eos_token_id": 2,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "relu", "activation_function")
        sizes, width = read_sizes(fields), read_width(fields, "ffn_dim")
        for key in ("do_layer_norm_before", "layer_norm_elementwise_affine"):
            if not fields.flag(key):
                raise fields.fail(key, "but must be true")
        if fields.integer("word_embed_proj_dim", 1, 2**20, default=sizes.hidden) != sizes.hidden:
            raise fields.fail("word_embed_proj_dim", f"but hidden_size is {sizes.hidden}")
        if fields.flag("_remove_final_layer_norm"):
            raise fields.fail("_remove_final_layer_norm", "but models have that norm")
        bias = fields.flag("enable_bias")
        norm = NormSpec(1e-5, centred=True, bias=True)
        attention = attention_of(sizes, None, qkv_bias=bias, o_bias=bias)
        mlp = MlpSpec(width, activation, gated=False, bias=bias)
        entry = EntrySpec(sizes.max_position + 2, skipped=2)

        def layer(number: int) -> LayerSpec:
            return LayerSpec(attention, mlp, Norms(norm), Norms(norm), entry=None if number else entry)

        return model(fields, architecture, sizes, layer, norm)
