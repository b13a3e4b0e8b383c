"""nomic-bert: an encoder with RoPE and gated MLPs, whose layers normalise sums as BERT's do."""

from __future__ import annotations

from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_rotary,
    read_width,
)
from mpillm.model.families.bert import encoder_sizes, first_token_classifier, unread, with_biases
from mpillm.model.fields import Fields
from mpillm.model.layers.entry import EntrySpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.pooled import ClassifierSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, encoder_config
from mpillm.weights.names import Names, Roles

_NOMIC = "NomicBertModel"
TRAINED = 2048  # positions that published models were trained with, whatever n_positions says

# As the authors publish them, and as transformers 5 writes them.
_LAYERS: dict[str, Roles] = {
    "encoder.layers.{l}.attn.Wqkv.weight": ("q", "k", "v"),
    "encoder.layers.{l}.attn.out_proj.weight": ("o",),
    "encoder.layers.{l}.mlp.fc11.weight": ("up",),
    "encoder.layers.{l}.mlp.fc12.weight": ("gate",),
    "encoder.layers.{l}.mlp.fc2.weight": ("down",),
    **with_biases({"encoder.layers.{l}.norm1": "attn_sum_norm", "encoder.layers.{l}.norm2": "ffn_sum_norm"}),
    **with_biases(
        {
            "layers.{l}.post_attention_layernorm": "attn_sum_norm",
            "layers.{l}.post_mlp_layernorm": "ffn_sum_norm",
        }
    ),
}
# GPT-2's keys, which the published configurations have, and what they mean here.
_OLD = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "activation_function": "hidden_act",
}
# What nomic-bert is, where a published configuration says so.
_FIXED: dict[str, tuple[Any, ...]] = {
    "prenorm": (False,),
    "rotary_emb_fraction": (1.0, 1),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "causal": (False,),
    "use_rms_norm": (False, None),
    "parallel_block": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}


class NomicBert(Family):
    """Tokens of longer prompts than it was trained with are refused."""

    architectures = {_NOMIC: "nomic_bert"}
    gguf = ("nomic-bert",)
    names = Names(
        hf={
            "embeddings.word_embeddings.weight": ("embed",),
            "embeddings.token_type_embeddings.weight": ("segments",),
            **with_biases({"emb_ln": "embed_norm", "embeddings.LayerNorm": "embed_norm"}),
            **_LAYERS,
            **with_biases({"pooler.dense": "pooler", "classifier": "classifier"}),
            **unread("cls.predictions", "cls.predictions.decoder"),
            **unread("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
            **unread("cls.predictions.transform.layer_norm"),
        },
        hf_prefixes=("nomic_bert.", "bert.", "model."),
    )
    defaults = {
        _NOMIC: {
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": TRAINED,
            "hidden_act": "silu",
            "rope_theta": 1000.0,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        fields.read |= {"gguf_pooled"}
        for key, allowed in _FIXED.items():
            if fields.raw(key) is not None and fields.raw(key) not in allowed:
                raise fields.fail(key, f"but {architecture} is built with {allowed[0]!r}")
        if "n_embd" in fields.values:
            fields = _renamed(fields)
        activation = read_activation(fields)
        sizes = encoder_sizes(fields, fields.integer("max_position_embeddings", 1, LONGEST))
        if fields.raw("head_dim") not in (None, sizes.head_dim):
            raise fields.fail("head_dim", f"but heads of {sizes.head_dim} dimensions make the width")
        norm = read_norm(fields, "layer_norm_eps", 1e-12, centred=True, bias=True)
        attention = attention_of(sizes, read_rotary(fields, sizes), bidirectional=True)
        mlp, entry = (
            MlpSpec(read_width(fields), activation),
            EntrySpec(0, fields.integer("type_vocab_size", 0, 2**16), norm),
        )
        sums = Norms(of_sum=norm)

        def layer(number: int) -> LayerSpec:
            return LayerSpec(attention, mlp, sums, sums, entry=None if number else entry)

        return model(fields, architecture, sizes, layer, None)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        return encoder_config(fields, shape_of, _NOMIC)

    def classifier(self, fields: Fields) -> ClassifierSpec:
        return first_token_classifier(_renamed(fields) if "n_embd" in fields.values else fields)


def _renamed(fields: Fields) -> Fields:
    """Return the fields of a published configuration under the names that transformers gives them."""
    values = {_OLD.get(key, key): value for key, value in fields.values.items()}
    if values.get("hidden_act") == "swiglu":
        values["hidden_act"] = "silu"
    values["max_position_embeddings"] = int(values.get("max_trained_positions") or TRAINED)
    found = Fields(values, fields.name, fields.defaults)
    found.read = fields.read | {"n_positions", "max_trained_positions", "rotary_scaling_factor"}
    return found
