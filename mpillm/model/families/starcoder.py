"""StarCoder 2: LayerNorm with biases, and an MLP with GELU and without a gate."""

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
    read_sizes,
    read_width,
)
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    usual_config,
)
from mpillm.weights.names import Names


class StarCoder(Family):
    """Pre-norm layers with biases everywhere, and perhaps a window in all of them."""

    architectures = {"Starcoder2ForCausalLM": "starcoder2"}
    gguf = ("starcoder2",)
    tied = True
    names = Names(
        hf={
            "layers.{l}.mlp.c_fc.weight": ("up",),
            "layers.{l}.mlp.c_fc.bias": ("up_bias",),
            "layers.{l}.mlp.c_proj.weight": ("down",),
            "layers.{l}.mlp.c_proj.bias": ("down_bias",),
        }
    )
    defaults = {
        "Starcoder2ForCausalLM": {
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "gelu_pytorch_tanh")
        sizes, width, bias = read_sizes(fields), read_width(fields), fields.flag("use_bias")
        norm = read_norm(fields, "norm_epsilon", 1e-5, centred=True, bias=True)
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
        for key in ("embedding_dropout", "norm_type", "mlp_type"):
            fields.raw(key)
        attention = attention_of(
            sizes,
            read_rotary(fields, sizes),
            window,
            qkv_bias=bias,
            o_bias=bias,
        )
        layer = LayerSpec(
            attention, MlpSpec(width, activation, gated=False, bias=bias), Norms(norm), Norms(norm)
        )
        return model(fields, architecture, sizes, lambda number: layer, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_experts(fields)
        refuse_window(fields)
        config = usual_config(fields, shape_of, ("layer_norm_epsilon", "norm_epsilon"))
        return config | {"architectures": ["Starcoder2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}
