"""Qwen 2 and 2.5, Qwen 3, and Qwen 3 with experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mpillm.errors import ModelError
from mpillm.kernels.types import Activation
from mpillm.model.config import ModelConfig
from mpillm.model.families.base import (
    Family,
    attention_of,
    model,
    read_activation,
    read_chosen,
    read_expert_count,
    read_norm,
    read_rotary,
    read_sizes,
    read_width,
    refuse_qk_norm,
)
from mpillm.model.families.layer_types import read_windows
from mpillm.model.fields import Fields
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
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
from mpillm.weights.roles import Key

_USUAL = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
_QWEN2, _QWEN3, _MIXTURE = "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
_QWEN2_MIXTURE, _VL_MIXTURE = "Qwen2MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"
# Of Qwen3-Reranker, whose files have none, as its authors publish it.
RERANKER = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n'
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
_OF_IMAGES = {"qwen2vl": "qwen2", "qwen3vl": "qwen3", "qwen3vlmoe": "qwen3moe"}  # GGUF files: the text part
_EXPERTS = "layers.{{l}}.mlp.experts.{}_proj"


class Qwen(Family):
    """Llama with biases on q, k and v (Qwen 2), or with norms of each head's q and k (Qwen 3)."""

    architectures = {_QWEN2: "qwen2", _QWEN3: "qwen3", _MIXTURE: "qwen3_moe", _QWEN2_MIXTURE: "qwen2_moe"}
    model_types: ClassVar[Mapping[str, str]] = {
        "qwen2_vl": _QWEN2,
        "qwen2_vl_text": _QWEN2,
        "qwen2_5_vl": _QWEN2,
        "qwen2_5_vl_text": _QWEN2,
        "qwen3_vl_text": _QWEN3,
    }
    gguf: ClassVar[tuple[str, ...]] = ("qwen2", "qwen3", "qwen3moe", "qwen2moe", *_OF_IMAGES)
    names = Names(
        hf={
            "layers.{l}.mlp.shared_expert.gate_proj.weight": ("shared_gate",),
            "layers.{l}.mlp.shared_expert.up_proj.weight": ("shared_up",),
            "layers.{l}.mlp.shared_expert.down_proj.weight": ("shared_down",),
        }
    )
    defaults = {
        _QWEN2: {"max_window_layers": 28, **_USUAL},
        _QWEN3: {"max_window_layers": 28, "head_dim": 128, **_USUAL},
        _MIXTURE: {
            **_USUAL,
            "num_key_value_heads": 4,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        _QWEN2_MIXTURE: {
            **_USUAL,
            "num_key_value_heads": 16,
            "num_local_experts": 60,
            "num_experts_per_tok": 4,
            "max_window_layers": 28,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
    }

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        activation = read_activation(fields)
        sizes, width = read_sizes(fields), read_width(fields)
        windows = _windows(fields, architecture, sizes.n_layers)
        experts, has_experts = _experts(fields, architecture, activation)
        qkv_bias, o_bias = _biases(fields, architecture)
        norm, rotary = read_norm(fields), read_rotary(fields, sizes)
        qk_norm = None if architecture in (_QWEN2, _QWEN2_MIXTURE) else norm
        refuse_qk_norm(fields, architecture, has=qk_norm is not None)

        def layer(number: int) -> LayerSpec:
            attention = attention_of(
                sizes,
                rotary,
                windows[number],
                qkv_bias=qkv_bias,
                o_bias=o_bias,
                qk_norm=qk_norm,
            )
            mlp = experts if experts and has_experts(number) else MlpSpec(width, activation)
            return LayerSpec(attention, mlp, Norms(norm), Norms(norm))

        template = RERANKER if architecture == _QWEN3 else None
        return model(fields, architecture, sizes, layer, norm, pair_template=template)

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        config = usual_config(fields, shape_of)
        kind = _OF_IMAGES.get(fields.kind, fields.kind)
        names = dict(zip(self.gguf, self.architectures.items(), strict=False))
        architecture, model_type = names[kind]
        for known in ("rope.dimension_sections", "n_deepstack_layers"):  # for images; a text has one position
            fields.raw(known)
        config |= {"architectures": [architecture], "model_type": model_type}
        refuse_window(fields)
        if kind not in (
            "qwen2",
            "qwen2moe",
        ):  # checking the tensors finds missing ones
            roles = ("q_bias", "k_bias", "v_bias", "o_bias")
            present = {role for role in roles if shape_of(Key(role, 0)) is not None}
            if present and len(present) < len(roles):
                raise ModelError(
                    f"{fields.path} has {', '.join(sorted(present))} without the other biases of its kind."
                )
            config |= {"attention_bias": True} if present else {}
        if kind not in ("qwen3moe", "qwen2moe"):
            refuse_experts(fields)
            return config
        newer = kind == "qwen3moe"
        if not newer:
            config["shared_expert_intermediate_size"] = fields.integer("expert_shared_feed_forward_length")
        layers = range(min(config["num_hidden_layers"], 4096))
        return config | {
            "num_experts": fields.integer("expert_count", 0),
            "num_experts_per_tok": fields.integer("expert_used_count", 0),
            "moe_intermediate_size": fields.integer("expert_feed_forward_length", 0)
            or fields.integer("feed_forward_length"),
            # llama.cpp always does for Qwen 3, and never for Qwen 2.
            "norm_topk_prob": fields.raw("expert_weights_norm") is not False if newer else False,
            "mlp_only_layers": [layer for layer in layers if shape_of(Key("router", layer)) is None],
            "decoder_sparse_step": 1,
        }


class QwenVlMixture(Qwen):
    """The text part of Qwen3-VL with experts, whose matrices lie transposed."""

    architectures = {_VL_MIXTURE: "qwen3_vl_moe_text"}
    model_types = {}
    gguf = ()
    names = Names(
        hf_stacked={_EXPERTS.format("gate_up"): ("gate", "up"), _EXPERTS.format("down"): ("down",)},
        hf_transposed=frozenset(_EXPERTS.format(name) for name in ("gate_up", "down")),
    )
    defaults = {_VL_MIXTURE: Qwen.defaults[_MIXTURE]}

    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        return super().config(fields, _MIXTURE)


def _windows(fields: Fields, architecture: str, n_layers: int) -> tuple[int, ...]:
    window = 0
    if fields.flag("use_sliding_window"):
        window = fields.optional_integer("sliding_window", 1, LONGEST) or 0
    # Ticked off whether used or not: a window that is switched off may have any value.
    fields.read |= {"sliding_window", "max_window_layers"}
    some, first = architecture != _MIXTURE, 0
    if window and some and _types_absent(fields):
        first = fields.integer("max_window_layers", 0, LONGEST)
        if architecture == _QWEN2_MIXTURE:  # there the first layers have windows, every second of them
            return tuple(0 if layer % 2 or layer >= first else window for layer in range(n_layers))
    return read_windows(fields, architecture, n_layers, window, first, some)


def _types_absent(fields: Fields) -> bool:
    return fields.values.get("layer_types") is None


def _experts(
    fields: Fields, architecture: str, activation: Activation
) -> tuple[ExpertsSpec | None, Callable[[int], bool]]:
    """Return the experts of the layers that have them, and which layers those are."""
    if architecture not in (_MIXTURE, _QWEN2_MIXTURE):
        return None, lambda layer: False
    count = read_expert_count(fields)
    width = read_width(fields, "moe_intermediate_size")
    normalise = fields.flag("norm_topk_prob")
    step = fields.integer("decoder_sparse_step", 1, LONGEST, default=1)
    dense = fields.integers("mlp_only_layers", 0, LONGEST)
    n_layers = fields.integer("num_hidden_layers", 1, 4096)
    chosen = fields.integer("num_experts_per_tok", 1, 2**16)

    def has_experts(layer: int) -> bool:
        return count > 0 and layer not in dense and (layer + 1) % step == 0

    if not any(has_experts(layer) for layer in range(n_layers)):
        fields.read.add("shared_expert_intermediate_size")
        return None, has_experts
    if chosen > count:
        chosen = read_chosen(fields, count)
    router = RouterSpec(chosen, normalise=normalise)
    if architecture == _MIXTURE:
        return ExpertsSpec(count, width, router, activation), has_experts
    shared = MlpSpec(read_width(fields, "shared_expert_intermediate_size"), activation, prefix="shared_")
    return ExpertsSpec(count, width, router, activation, shared, shared_router=True), has_experts


def _biases(fields: Fields, architecture: str) -> tuple[bool, bool]:
    """Return whether q, k and v have biases, and whether attention's output has."""
    if architecture == _QWEN2_MIXTURE:
        return fields.flag("qkv_bias"), False
    if architecture != _QWEN2:
        bias = fields.flag("attention_bias")
        return bias, bias
    for key in ("attention_bias", "qkv_bias"):  # exporters may say so, but may not deny it
        if fields.raw(key) not in (None, True):
            raise fields.fail(key, "but Qwen2ForCausalLM always has biases on q, k and v")
    return True, False
