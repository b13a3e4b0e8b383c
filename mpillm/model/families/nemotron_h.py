"""Nemotron-H and Nemotron 3: each layer is one thing, a Mamba-2 mixer, attention without RoPE, an MLP, or experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpillm.errors import ModelError
from mpillm.kernels.types import Activation
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    SMALL_BOS,
    Family,
    attention_of,
    model,
    read_activation,
    read_norm,
    read_sizes,
    read_width,
    require_silu,
)
from mpillm.model.families.layer_types import FULL, read_layer_types
from mpillm.model.families.mamba import GGUF_NAMES, gguf_mamba, hf_names, mamba_rows, read_mamba
from mpillm.model.families.routed import OF_EXPERTS, read_routed_experts
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec
from mpillm.model.layers.mixer import Mixer
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import Norms, NormSpec
from mpillm.model.layers.spec import LayerSpec
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf, routed_config, usual_config
from mpillm.weights.names import Names, RowGroups
from mpillm.weights.roles import Key

_NEMOTRON = "NemotronHForCausalLM"
_MAMBA, _MLP, _EXPERTS = "linear_attention", "mlp", "moe"
_LETTERS = {"M": _MAMBA, "*": FULL, "-": _MLP, "E": _EXPERTS}
_OLD = {"mamba": _MAMBA, "attention": FULL}
_KEYS = {
    "heads": "mamba_num_heads",
    "head_dim": "mamba_head_dim",
    "groups": "n_groups",
    "state": "ssm_state_size",
    "taps": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_USUAL = {
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "use_conv_bias": True,
}
_LAYER = "layers.{l}.mixer."


class NemotronH(Family):
    """A layer's only norm is called by the same name whatever the layer is."""

    architectures = {_NEMOTRON: "nemotron_h"}
    gguf = ("nemotron_h", "nemotron_h_moe")
    names = Names(
        hf={
            **hf_names("mixer"),
            "layers.{l}.norm.weight": ("attn_norm",),
            **{f"{_LAYER}{name}_proj.weight": (name,) for name in ("q", "k", "v", "o")},
            **{f"{_LAYER}experts.{{e}}.{name}_proj.weight": (name,) for name in ("up", "down")},
            **{
                f"{_LAYER}{part}{name}_proj.{end}": (f"{prefix}{name}{bias}",)
                for name in ("up", "down")
                for part, prefix in (("", ""), ("shared_experts.", "shared_"))
                for end, bias in (("weight", ""), ("bias", "_bias"))
            },
            **{
                f"{_LAYER}{file}_latent_proj.{end}": (f"latent_{way}{bias}",)
                for file, way in (("fc1", "in"), ("fc2", "out"))
                for end, bias in (("weight", ""), ("bias", "_bias"))
            },
            f"{_LAYER}gate.weight": ("router",),
            f"{_LAYER}gate.e_score_correction_bias": ("router_correction",),
            "embeddings.weight": ("embed",),
            "norm_f.weight": ("final_norm",),
        },
        gguf=GGUF_NAMES,
        hf_prefixes=("backbone.", "model."),
    )
    defaults = {
        _NEMOTRON: {
            **_USUAL,
            **SMALL_BOS,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "n_routed_experts": 8,
        }
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        types = _layer_types(fields)
        sizes, norm = read_sizes(fields, len(types)), read_norm(fields, "layer_norm_epsilon", 1e-5)
        bias = fields.flag("mlp_bias")
        activation = read_activation(fields, "relu2", "mlp_hidden_act")
        require_silu(fields, "mamba_hidden_act")
        fields.read |= {"expand", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_hidden_layers"}
        fields.read |= {"moe_shared_expert_overlap", "rope_theta", "hidden_act"}
        # transformers does not look at these.
        fields.read |= {"attention_bias", "mamba_proj_bias", "sliding_window"}
        parts: dict[str, LayerSpec] = {}
        for kind in set(types):
            mixer: Mixer | None = None
            mlp: MlpSpec | ExpertsSpec | None = None
            if kind == _MAMBA:
                mixer = _mamba(fields, norm)
            elif kind == FULL:
                mixer = attention_of(sizes, None)
            elif kind == _MLP:
                mlp = MlpSpec(read_width(fields), activation, gated=False, bias=bias)
            else:
                mlp = _experts(fields, activation, bias)
            parts[kind] = LayerSpec(mixer, mlp, Norms(norm), Norms(), parallel=mixer is None)
        fields.read |= _OF_PARTS  # a model may have no layer that they are about
        return model(fields, architecture, sizes, lambda number: parts[types[number]], norm)

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        sizes = [config.get(_KEYS[word], _USUAL[_KEYS[word]]) for word in ("heads", "head_dim")]
        heads, head_dim = (size if type(size) is int else 1 for size in sizes)
        return mamba_rows({**_USUAL, **config}, _KEYS, heads * head_dim)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        head_dim = fields.integer("attention.key_length")
        for name in ("attention.value_length", "rope.dimension_count", "rope.scaling.finetuned"):
            fields.raw(name)  # there is no RoPE
        config = usual_config(
            fields,
            shape_of,
            eps=("layer_norm_rms_epsilon", "layer_norm_epsilon"),
            partial=True,
            head_dim=head_dim,
        )
        layers = range(min(max(config["num_hidden_layers"], 0), 4096))
        for key in ("hidden_act", "num_hidden_layers"):
            config.pop(key)
        config |= {
            **gguf_mamba(fields, _KEYS),
            "architectures": [_NEMOTRON],
            "layers_block_type": [_kind(shape_of, layer) for layer in layers],
        }
        if fields.kind == "nemotron_h":
            return config
        if fields.integer("expert_gating_func", 2) != 2:
            raise ModelError(
                f"{fields.path}: only experts that a sigmoid chooses are supported in {fields.kind} files."
            )
        shared = fields.integer("expert_shared_feed_forward_length")
        latent = fields.integer("moe_latent_size", 0) or None
        own = {"moe_shared_expert_intermediate_size": shared, "moe_latent_size": latent}
        return config | routed_config(fields) | own


_OF_PARTS = {
    *_KEYS.values(),
    *OF_EXPERTS,
    "intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "time_step_limit",
}


def _kind(shape_of: ShapeOf, layer: int) -> str:
    """Return the kind of a layer of a GGUF file."""
    roles = {"mamba_rates": _MAMBA, "q": FULL, "router": _EXPERTS}
    return next((kind for role, kind in roles.items() if shape_of(Key(role, layer)) is not None), _MLP)


def _layer_types(fields: Fields) -> Sequence[str]:
    """Return the kind of each layer, by its name or by a letter; sets how many there are."""
    pattern = fields.raw("hybrid_override_pattern")
    key = "layers_block_type" if "layers_block_type" in fields.values else "layer_types"
    if fields.values.get(key) is None and isinstance(pattern, str):
        if not set(pattern) <= set(_LETTERS):
            raise fields.fail("hybrid_override_pattern", f"but must be letters of {''.join(_LETTERS)}")
        return [_LETTERS[letter] for letter in pattern]
    count = fields.values.get(key)
    types = read_layer_types(
        fields, len(count) if isinstance(count, list) else 1, *_LETTERS.values(), *_OLD, key=key
    )
    if not types:
        raise ModelError(f"{fields.name}: layers_block_type is missing; it must name the kind of each layer.")
    return [_OLD.get(kind, kind) for kind in types]


def _mamba(fields: Fields, norm: NormSpec) -> Mixer:
    heads, head_dim = (fields.integer(_KEYS[word], 1, 2**16) for word in ("heads", "head_dim"))
    low = fields.number("time_step_min", 0, 1e9, default=0.001)
    return read_mamba(fields, _KEYS, heads * head_dim, norm, dt_range=(low, float("inf")))


def _experts(fields: Fields, activation: Activation, bias: bool) -> ExpertsSpec:
    spec = read_routed_experts(fields, activation)
    width = read_width(fields, "moe_shared_expert_intermediate_size")
    shared = MlpSpec(width, activation, gated=False, bias=bias, prefix="shared_")
    latent = fields.optional_integer("moe_latent_size", 1, 2**20) or 0
    return replace(spec, gated=False, shared=shared, latent=latent, latent_bias=bias and latent > 0)
