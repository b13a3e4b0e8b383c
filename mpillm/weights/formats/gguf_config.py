"""The fields of a GGUF file, and the keys of Hugging Face's config.json that families make of them.

What a field means is taken from llama.cpp (src/llama-model.cpp) and its convert_hf_to_gguf.py. A field of the
architecture that is not known here might change the result, and is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mpillm.errors import ModelError
from mpillm.weights.roles import Key

ShapeOf = Callable[[Key], Sequence[int] | None]


POOLED = ("pooler", "pooler_bias", "pooler_norm", "pooler_norm_bias", "classifier", "classifier_bias")
# Fields without effect here: sizes are read off the tensors, the rest describes how the file was made.
_IGNORED = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_UNSET = (-1, 2**32 - 1)  # ids that stand for "no such token", signed and unsigned
# Features that the decoder does not have, with the values that mean so.
_OFF: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # 1 is softmax
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "use_parallel_residual": (False,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
}


def usual_config(
    fields: GgufFields,
    shape_of: ShapeOf,
    eps: tuple[str, str] = ("layer_norm_rms_epsilon", "rms_norm_eps"),
    partial: bool = False,
    head_dim: int | None = None,
    kv_heads: int | None = None,
) -> dict[str, Any]:
    """Return the keys of nearly all models, from their usual fields; `eps` has the field and the key of what norms add.

    `partial`: RoPE may turn a part of each head; and all layers may have experts, so that no other MLP has a width.
    `head_dim` and `kv_heads` are given where the usual fields do not say it.
    """
    embed = shape_of(Key("embed"))
    if embed is None:
        raise ModelError(f"{fields.path} has no tensor token_embd.weight; fetch the model again.")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    if heads < 1:
        raise ModelError(
            f"{fields.path}: {fields.kind}.attention.head_count is {heads}, but must be at least 1."
        )
    # llama.cpp's converter writes both numbers of models whose configurations have norm_eps; it reads one.
    fields.read |= {"attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"}
    return {
        "hidden_size": hidden,
        "num_hidden_layers": fields.integer("block_count") - fields.integer("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or fields.of_some_layers("attention.head_count_kv", heads),
        "vocab_size": embed[0],
        "max_position_embeddings": fields.integer("context_length"),
        eps[1]: fields.number(f"attention.{eps[0]}"),
        "hidden_act": "silu",
        "tie_word_embeddings": shape_of(Key("head")) is None,
        "intermediate_size": fields.of_some_layers("feed_forward_length", 0 if partial else None),
        **(_head_dim(fields, hidden // heads, partial) if head_dim is None else {"head_dim": head_dim}),
        **special_tokens(fields.metadata),
    }


def encoder_config(fields: GgufFields, shape_of: ShapeOf, architecture: str) -> dict[str, Any]:
    """Return the keys of encoders, from their usual fields; a classifier's layers are those that the file has."""
    if fields.raw("attention.causal") is not False:
        raise ModelError(
            f"{fields.path}: only encoders are supported in {fields.kind} files (attention.causal)."
        )
    config = usual_config(fields, shape_of, ("layer_norm_epsilon", "layer_norm_eps"))
    for key in ("head_dim", "num_key_value_heads"):  # these keys follow from the others
        del config[key]
    segments = shape_of(Key("segments"))
    return config | {
        "architectures": [architecture],
        "type_vocab_size": segments[0] // config["hidden_size"] if segments else 0,
        "gguf_pooled": [role for role in POOLED if shape_of(Key(role)) is not None],
    }


def routed_config(fields: GgufFields, names: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Return the keys of experts as DeepSeek V3 has them, from their usual fields; `names`: a family's own names."""
    keys = {
        "n_routed_experts": fields.integer("expert_count"),
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "n_shared_experts": fields.integer("expert_shared_count", 0),
        "n_group": fields.integer("expert_group_count", 1) or 1,
        "topk_group": fields.integer("expert_group_used_count", 1) or 1,
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": fields.raw("expert_weights_norm") is True,
        "first_k_dense_replace": fields.integer("leading_dense_block_count", 0),
    }
    return {names.get(key, key): value for key, value in keys.items()}


def window_types(fields: GgufFields, n_layers: int, every: int) -> list[str]:
    """layer_types: what the file says of each layer, or else that every n-th one has no window."""
    said = fields.raw("attention.sliding_window_pattern")
    if isinstance(said, list | bool):
        flags = said if isinstance(said, list) else [said] * n_layers
        return ["sliding_attention" if flag else "full_attention" for flag in flags]
    every = fields.integer("attention.sliding_window_pattern", every)
    return [
        "sliding_attention" if every > 0 and (layer + 1) % every else "full_attention"
        for layer in range(min(n_layers, 4096))
    ]


def refuse_experts(fields: GgufFields) -> None:
    """Raise ModelError if the file has experts."""
    if fields.integer("expert_count", 0):
        raise ModelError(f"{fields.path}: experts are not supported in {fields.kind} files.")
    fields.integer("expert_used_count", 0)


def refuse_gating(fields: GgufFields) -> None:
    """Raise ModelError if a file's router is another one than a sigmoid, which an absent field means as well."""
    if (fields.integer("expert_gating_func", 2) or 2) != 2:
        raise ModelError(f"{fields.path}: {fields.kind}.expert_gating_func must be 2, a sigmoid.")


def refuse_window(fields: GgufFields) -> None:
    """Raise ModelError if the file has a sliding window."""
    if fields.integer("attention.sliding_window", 0):
        raise ModelError(f"{fields.path}: attention.sliding_window is not supported in {fields.kind} files.")


class GgufFields:
    """The fields `<architecture>.*`, ticked off as they are read."""

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self.metadata = metadata
        self.kind = kind = str(metadata["general.architecture"])
        self.path = path
        prefix = kind + "."
        self.values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
        self.read: set[str] = set()

    def raw(self, name: str) -> Any:
        self.read.add(name)
        value = self.values.get(name)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]  # one number per layer, all the same
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._given(name, default)
        if type(value) is not int:
            raise self._wrong(name, value, "one whole number")
        return value

    def of_some_layers(self, name: str, default: int | None = None) -> int:
        """Return one whole number, or a list with it for each layer, and 0 for those layers that have no such thing."""
        value = self.raw(name)
        if not isinstance(value, list):
            return self.integer(name, default)
        found = {item for item in value if item != 0}
        if len(found) != 1 or type(next(iter(found))) is not int:
            raise self._wrong(name, value, "one whole number, or that and zeros")
        return int(found.pop())

    def number(self, name: str, default: float | None = None) -> float:
        value = self._given(name, default)
        if type(value) not in {int, float} or not math.isfinite(value):
            raise self._wrong(name, value, "one finite number")
        return float(value)

    def _given(self, name: str, default: float | None) -> Any:
        value = self.raw(name)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"{self.path}: metadata field {self.kind}.{name} is missing.")
        return default

    def _wrong(self, name: str, value: Any, must_be: str) -> ModelError:
        return ModelError(
            f"{self.path}: metadata field {self.kind}.{name} is {str(value)[:60]}, but must be {must_be}."
        )

    def refuse_unknown(self) -> None:
        for name, value in sorted(self.values.items()):
            if name not in self.read and name not in _IGNORED and value not in _OFF.get(name, ()):
                raise ModelError(
                    f"{self.path}: {self.kind}.{name} = {str(value)[:60]} may change the result and is not supported."
                )


def special_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    """Begin and end of text; a chat's end of turn ends a text as well, as in llama.cpp."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    bos = ids.pop("bos")
    ends = sorted({end for end in ids.values() if type(end) is int and end not in _UNSET})
    return {"bos_token_id": None if bos in _UNSET else bos, "eos_token_id": ends or None}


def _head_dim(fields: GgufFields, default: int, partial: bool) -> dict[str, Any]:
    head_dim = fields.integer("attention.key_length", default)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{fields.path}: keys and values of different lengths are not supported.")
    turning = fields.integer("rope.dimension_count", head_dim)
    if partial and 0 < turning <= head_dim:
        # What it comes to is cut to a whole number.
        part = 1.0 if turning == head_dim else (turning + 0.5) / head_dim
        return {"head_dim": head_dim, "partial_rotary_factor": part}
    if turning != head_dim:
        raise ModelError(
            f"{fields.path}: {fields.kind}.rope.dimension_count is {fields.values['rope.dimension_count']}, but only "
            f"models that rotate the whole head ({head_dim}) are supported."
        )
    return {"head_dim": head_dim}
