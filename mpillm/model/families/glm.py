"""GLM-4 (dense), and GLM-4.5 and later with experts: RoPE of a part of each head."""

from __future__ import annotations

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
)
from mpillm.model.families.routed import read_routed_experts
from mpillm.model.fields import Fields
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope_fields import LONGEST
from mpillm.weights.names import Names

_DENSE, _MIXTURE = "Glm4ForCausalLM", "Glm4MoeForCausalLM"


class Glm(Family):
    """Dense layers have norms before and after; a mixture's router is a sigmoid with a correction, and has groups."""

    architectures = {_DENSE: "glm4", _MIXTURE: "glm4_moe"}
    model_types = {"glm4v_text": _DENSE, "glm4v_moe_text": _MIXTURE}
    names = Names(hf={"layers.{l}.mlp.gate_up_proj.weight": ("gate", "up")})
    defaults = {
        _DENSE: {
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-07,
            "attention_bias": True,
            "eos_token_id": [151329, 151336, 151338],
        },
        _MIXTURE: {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 8,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields, "silu", "swish")
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias, mixture = fields.flag("attention_bias"), architecture == _MIXTURE
        attention = attention_of(
            sizes,
            read_partial_rotary(fields, sizes, default=0.5, interleaved=not mixture),
            qkv_bias=bias,
            qk_norm=norm if mixture and fields.flag("use_qk_norm") else None,
        )
        mlp = MlpSpec(width, activation)
        if not mixture:
            dense = LayerSpec(attention, mlp, Norms(norm, norm), Norms(norm, norm))
            return model(fields, architecture, sizes, lambda number: dense, norm)
        experts = read_routed_experts(fields)
        first = fields.integer("first_k_dense_replace", 0, LONGEST, default=1)
        fields.raw("num_nextn_predict_layers")  # layers beyond the model's own, which are not read

        def layer(number: int) -> LayerSpec:
            return LayerSpec(attention, experts if number >= first else mlp, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, layer, norm)
