"""Hunyuan, dense and with experts: norms of q and k after RoPE."""

from __future__ import annotations

from typing import Any

from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
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
from mpillm.model.fields import Fields
from mpillm.model.layers.attention import Rotary
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms
from mpillm.model.layers.spec import LayerSpec
from mpillm.model.rope import RopeConfig
from mpillm.weights.formats.gguf_config import (
    GgufFields,
    ShapeOf,
    refuse_experts,
    refuse_window,
    routed_config,
    usual_config,
)
from mpillm.weights.names import Names
from mpillm.weights.roles import Key

_DENSE, _MIXTURE = "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM"
# What published files say of how the model is built, with the values that mean what is computed here.
_BUILT: dict[str, tuple[Any, ...]] = {
    "use_qk_norm": (True,),
    "use_cla": (False,),
    "use_rotary_pos_emb": (True,),
    "moe_layer_num_skipped": (0,),
    "norm_type": ("rms", "hf_rms", "fused"),
    "mlp_bias": (False,),
}
_OF_MIXTURES = {"num_experts", "moe_topk", "num_shared_expert"}  # dense models' files have them too
_USUAL = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, **SMALL_BOS}


class Hunyuan(Family):
    """All layers of a mixture have experts, as wide as a dense MLP would be, and one that all tokens share."""

    architectures = {_DENSE: "hunyuan_v1_dense", _MIXTURE: "hunyuan_v1_moe"}
    gguf = ("hunyuan-dense", "hunyuan-moe")
    names = Names(
        hf={
            "layers.{l}.self_attn.query_layernorm.weight": ("q_norm",),
            "layers.{l}.self_attn.key_layernorm.weight": ("k_norm",),
            "layers.{l}.mlp.gate.wg.weight": ("router",),
            **{
                f"layers.{{l}}.mlp.shared_mlp.{name}_proj.weight": (f"shared_{name}",)
                for name in ("gate", "up", "down")
            },
        }
    )
    defaults = {_DENSE: _USUAL, _MIXTURE: {**_USUAL, "num_experts": 1, "moe_topk": 1}}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width, norm = read_sizes(fields), read_width(fields), read_norm(fields)
        bias = fields.flag("attention_bias")
        attention = attention_of(
            sizes,
            _rotary(fields, sizes),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=norm,
            normed_after_rope=True,
        )
        for key, as_built in _BUILT.items():
            if fields.raw(key) not in (None, *as_built):
                raise fields.fail(key, f"but {architecture} is not supported with that")
        dense = MlpSpec(width, activation)
        if architecture == _DENSE:
            fields.read |= _OF_MIXTURES
            layer = LayerSpec(attention, dense, Norms(norm), Norms(norm))
            return model(fields, architecture, sizes, lambda number: layer, norm)
        if any(count != 1 for count in fields.integers("num_shared_expert", 0, 2**16)):
            raise fields.fail("num_shared_expert", "but only one shared expert is supported")
        counts, chosen, widths = (
            _of_layers(fields, key, sizes.n_layers, default)
            for key, default in (("num_experts", 1), ("moe_topk", 1), ("moe_intermediate_size", width))
        )

        def mixture(number: int) -> LayerSpec:
            count, few = counts[number], chosen[number]
            if few > count:
                raise fields.fail("moe_topk", f"but layer {number} has {count} experts")
            shared = MlpSpec(width, activation, prefix="shared_")
            experts = ExpertsSpec(count, widths[number], RouterSpec(few), activation, shared)
            return LayerSpec(attention, experts, Norms(norm), Norms(norm))

        return model(fields, architecture, sizes, mixture, norm)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        refuse_window(fields)
        config = usual_config(fields, shape_of)
        config["attention_bias"] = shape_of(Key("o_bias", 0)) is not None
        if fields.kind == "hunyuan-dense":
            refuse_experts(fields)
            return config | {"architectures": [_DENSE]}
        routed, width = routed_config(fields), config["intermediate_size"]
        return config | {
            "architectures": [_MIXTURE],
            "intermediate_size": fields.integer("expert_shared_feed_forward_length", width),
            "num_experts": routed["n_routed_experts"],
            "moe_topk": routed["num_experts_per_tok"],
            "moe_intermediate_size": routed["moe_intermediate_size"],
            "num_shared_expert": routed["n_shared_experts"],
        }


def _rotary(fields: Fields, sizes: Sizes) -> Rotary:
    """RoPE, whose base a fixed alpha changes once and for all in what the files call a dynamic one."""
    for table in (fields.values.get("rope_parameters"), fields.values.get("rope_scaling")):
        if not isinstance(table, dict) or "dynamic" not in (table.get("rope_type"), table.get("type")):
            continue
        rope = Fields(table, f"{fields.name}, rope parameters", fields.defaults)
        if (alpha := rope.optional_number("alpha", 1e-6, 1e9)) is None:
            break  # one that depends on the length
        fields.read |= {"rope_parameters", "rope_scaling"}
        flat = fields.number("rope_theta", 1.0, 1e30, default=1e4)
        theta = rope.number("rope_theta", 1.0, 1e30, default=flat)
        dim = sizes.head_dim
        if dim < 4:
            raise fields.fail("head_dim", "but must be at least 4 with a dynamic RoPE")
        return Rotary(RopeConfig(theta * alpha ** (dim / (dim - 2))), dim)
    return read_rotary(fields, sizes)


def _of_layers(fields: Fields, key: str, n_layers: int, default: int) -> tuple[int, ...]:
    """Return a number for each layer; published files have one for all, or a list."""
    given = fields.integers(key, 1, 2**24) or (default,)
    if len(given) not in (1, n_layers):
        raise fields.fail(key, f"but must be a number, or {n_layers} of them, one per layer")
    return given * n_layers if len(given) == 1 else given
