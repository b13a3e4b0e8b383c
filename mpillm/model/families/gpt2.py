"""GPT-2: learned positions instead of RoPE, and matrices that lie transposed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import Family, Sizes, attention_of, model, read_activation, read_norm
from mpillm.model.fields import Fields
from mpillm.model.layers.entry import EntrySpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, refuse_experts, usual_config
from mpillm.weights.names import Names, Roles

_GPT2 = "GPT2LMHeadModel"
_MATRICES: dict[str, Roles] = {
    "attn.c_attn": ("q", "k", "v"),
    "attn.c_proj": ("o",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
}


class Gpt2(Family):
    """Pre-norm layers with LayerNorm, GELU, and biases everywhere."""

    architectures = {_GPT2: "gpt2"}
    gguf = ("gpt2",)
    tied = True
    names = Names(
        hf={
            "wte.weight": ("embed",),
            "ln_f.weight": ("final_norm",),
            "ln_f.bias": ("final_norm_bias",),
            "h.{l}.ln_1.weight": ("attn_norm",),
            "h.{l}.ln_1.bias": ("attn_norm_bias",),
            "h.{l}.ln_2.weight": ("ffn_norm",),
            "h.{l}.ln_2.bias": ("ffn_norm_bias",),
            **{f"h.{{l}}.{name}.weight": roles for name, roles in _MATRICES.items()},
            **{
                f"h.{{l}}.{name}.bias": tuple(f"{role}_bias" for role in roles)
                for name, roles in _MATRICES.items()
            },
            "h.{l}.attn.bias": (),  # the causal mask, which old files have
            "h.{l}.attn.masked_bias": (),
        },
        gguf={
            "blk.{l}.attn_qkv.weight": ("q", "k", "v"),
            "blk.{l}.attn_qkv.bias": ("q_bias", "k_bias", "v_bias"),
        },
        hf_transposed=frozenset(f"h.{{l}}.{name}.weight" for name in _MATRICES),
        hf_prefixes=("transformer.",),
    )
    defaults = {
        _GPT2: {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256}
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "gelu_new", "activation_function")
        hidden, heads = fields.integer("n_embd", 2, 2**20), fields.integer("n_head", 1, 2**16)
        if hidden % heads:
            raise fields.fail("n_embd", f"but must be a multiple of n_head ({heads})")
        positions = fields.integer("n_positions", 1, LONGEST)
        sizes = Sizes(
            fields.integer("n_layer", 1, 4096),
            hidden,
            heads,
            heads,
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
            "architectures": [_GPT2],
            "n_embd": usual["hidden_size"],
            "n_head": usual["num_attention_heads"],
            "n_layer": usual["num_hidden_layers"],
            "n_inner": usual["intermediate_size"],
            "n_positions": usual["max_position_embeddings"],
            "activation_function": "gelu_new",
            **{
                key: usual[key]
                for key in ("vocab_size", "layer_norm_epsilon", "bos_token_id", "eos_token_id")
            },
        }
