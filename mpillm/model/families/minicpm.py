"""MiniCPM 3: latent attention with RoPE of halves, a dense MLP, and factors of embeddings, residuals and logits."""

from __future__ import annotations

from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import SMALL_BOS, Family, model, read_activation, read_norm, read_width
from mpillm.model.families.deepseek import latent_attention, latent_sizes
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

_MINICPM3 = "MiniCPM3ForCausalLM"


class MiniCpm3(Family):
    """Residuals are divided by the square root of the number of layers, times `scale_depth`."""

    architectures = {_MINICPM3: "minicpm3"}
    gguf = ("minicpm3",)
    tied = True
    defaults = {
        _MINICPM3: {
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "kv_lora_rank": 256,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
            **SMALL_BOS,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = latent_sizes(fields), read_width(fields), read_norm(fields)
        attention = latent_attention(fields, sizes, interleaved=False)
        mlp = MlpSpec(width, activation, bias=fields.flag("mlp_bias"))
        root = sizes.n_layers**0.5
        depth = fields.number("scale_depth", 1e-9, 1e9, default=root)
        base = fields.integer("dim_model_base", 1, 2**20, default=sizes.hidden)
        fields.read |= {"qk_head_dim"}
        layer = LayerSpec(attention, mlp, Norms(norm), Norms(norm), depth / root)
        return model(
            fields,
            architecture,
            sizes,
            lambda number: layer,
            norm,
            embedding_scale=fields.number("scale_emb", 1e-9, 1e9),
            logit_scale=base / sizes.hidden,
        )

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        """llama.cpp knows no factors but those of the model that was published."""
        refuse_experts(fields)
        refuse_window(fields)
        whole, turning = fields.integer("attention.key_length"), fields.integer("rope.dimension_count")
        config = usual_config(fields, shape_of, head_dim=turning)
        heads = config["num_attention_heads"]
        return config | {
            "architectures": [_MINICPM3],
            "q_lora_rank": fields.integer("attention.q_lora_rank", 0) or None,
            "kv_lora_rank": fields.integer("attention.kv_lora_rank"),
            "qk_nope_head_dim": whole - turning,
            "qk_rope_head_dim": turning,
            "v_head_dim": fields.integer("attention.value_length", config["hidden_size"] // heads),
        }
