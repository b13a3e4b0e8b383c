"""The configuration of a GGUF file: what its family reads of it, its classifier, and its RoPE.

What a field means is taken from llama.cpp (src/llama-model.cpp) and its convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from mpillm.errors import ModelError
from mpillm.weights.formats.gguf_config import GgufFields, ShapeOf
from mpillm.weights.names import GGUF_LONGROPE_FACTORS, GGUF_ROPE_FACTORS, Names, RowGroups
from mpillm.weights.roles import Key


class GgufFamily(Protocol):
    """The knowledge of a family of models about GGUF files."""

    @property
    def names(self) -> Names: ...
    @property
    def gguf(self) -> tuple[str, ...]: ...
    @property
    def gguf_adapters(self) -> tuple[str, ...]: ...
    @property
    def tied(self) -> bool: ...
    @property
    def yarn_multiplies_scores(self) -> bool: ...
    def gguf_names(self, tensors: Collection[str]) -> Names:
        """Return the names of the tensors of a file that has these `tensors`."""

    def gguf_config(self, fields: GgufFields, shape_of: ShapeOf) -> dict[str, Any]:
        """Return the configuration with Hugging Face's keys, without RoPE's."""

    def row_groups(self, config: Mapping[str, Any]) -> RowGroups:
        """Return the division of tensors that hold several matrices."""


def config_of(
    metadata: dict[str, Any],
    path: Path,
    family: GgufFamily,
    shape_of: ShapeOf,
    rope_factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """Return the configuration with Hugging Face's keys; `shape_of` tells a tensor's shape, or None if it is not there.

    `rope_factors` has the values of tensors with divisors of rotary frequencies, by name. Where the family has
    something to say of the RoPE, the file's fields are added to it.
    """
    fields = GgufFields(metadata, path)
    config = family.gguf_config(fields, shape_of)
    if pooling := fields.integer("pooling_type", 0):
        config["pooling_type"] = pooling
    if (classifier := shape_of(Key("classifier"))) is not None:
        config |= _classifier(fields, config, classifier[0])
    rope = _rope(fields, config, rope_factors, family.yarn_multiplies_scores)
    config["rope_parameters"] = config.get("rope_parameters", {}) | rope
    fields.refuse_unknown()
    return config


def _classifier(fields: GgufFields, config: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the keys of a model with a classifier instead of an LM head, as transformers names its class."""
    stem = config["architectures"][0].removesuffix("ForCausalLM").removesuffix("Model")
    named = f"{stem}ForSequenceClassification"
    fields.read.add("classifier.output_labels")
    labels = fields.values.get("classifier.output_labels") or [f"LABEL_{index}" for index in range(count)]
    return {
        "architectures": [named],
        "id2label": {str(index): str(label) for index, label in enumerate(labels)},
    }


def _rope(
    fields: GgufFields, config: dict[str, Any], factors: Mapping[str, list[float]], multiplies_scores: bool
) -> dict[str, Any]:
    theta = fields.number("rope.freq_base", 10000.0)
    if (
        fields.values.get("rope.freq_base_swa") == theta
    ):  # written of all models whose layers name their RoPE by type
        fields.raw("rope.freq_base_swa")
    kind = fields.raw("rope.scaling.type")
    factor = fields.number("rope.scaling.factor", 0.0)
    linear = fields.number("rope.scale_linear", 0.0)  # how it was called before
    original = fields.integer("rope.scaling.original_context_length", 0)
    attention = fields.number("rope.scaling.attn_factor", 1.0) or 1.0
    beta_fast = fields.number("rope.scaling.yarn_beta_fast", 0.0)
    beta_slow = fields.number("rope.scaling.yarn_beta_slow", 0.0)
    if kind is None:
        kind, factor = ("linear", factor or linear) if (factor or linear) else ("none", 0.0)
    rope: dict[str, Any] = {"rope_theta": theta}
    longrope = {key: factors[name] for key, name in GGUF_LONGROPE_FACTORS.items() if name in factors}
    if len(longrope) == len(GGUF_LONGROPE_FACTORS) and kind in {"none", "longrope"}:
        old = {"original_max_position_embeddings": original or config["max_position_embeddings"]}
        return rope | longrope | old | {"rope_type": "longrope", "attention_factor": attention}
    if kind not in {"none", "linear", "yarn"}:
        raise ModelError(
            f"{fields.path}: {fields.kind}.rope.scaling.type {str(kind)[:40]!r} is not supported."
        )
    if attention != 1.0 and kind != "yarn":
        raise ModelError(
            f"{fields.path}: {fields.kind}.rope.scaling.attn_factor without yarn is not supported."
        )
    if GGUF_ROPE_FACTORS in factors:
        if kind != "none" and factor not in {0.0, 1.0}:
            raise ModelError(
                f"{fields.path}: rope_freqs.weight together with {kind} scaling is not supported."
            )
        return rope | {"rope_type": "factors", "factors": factors[GGUF_ROPE_FACTORS]}
    if kind == "none" or factor in {0.0, 1.0}:
        return rope | {"rope_type": "default"}
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    rope |= {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or config["max_position_embeddings"],
    }
    if beta_fast:
        rope["beta_fast"] = beta_fast
    if beta_slow:
        rope["beta_slow"] = beta_slow
    if multiplies_scores and "rope.scaling.yarn_log_multiplier" in fields.values:
        # convert_hf_to_gguf.py writes a tenth of mscale_all_dim, and llama.cpp takes mscale to be the same.
        scale = fields.number("rope.scaling.yarn_log_multiplier") * 10
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    own = fields.number("rope.scaling.yarn_attn_factor", 1.0)  # as transformers' configurations have it
    if own != 1.0:
        rope["attention_factor"] = own
    elif attention != 1.0:
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return rope
