"""A configuration's rotary embedding: the old style (rope_theta, rope_scaling) and the newer one (rope_parameters)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mpillm.errors import ModelError
from mpillm.model.fields import Fields
from mpillm.model.rope import RopeConfig, yarn_attention_factor, yarn_scale

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional", "factors")
RENAMED = {"mrope": "default", "su": "longrope"}  # what older files say
LONGEST = 2**31 - 1  # positions are int32 in the kernels
# Written into the dict by some exporters whatever the kind; without effect there. mrope_section says which dimensions
# turn by an image's height and width: those of a text all turn alike. llama_4_scaling_beta and
# the mscales are read by the families that have them.
HARMLESS = {
    "attn_factor", "finetuned", "llama_4_scaling_beta", "long_mscale", "max_position_embeddings", "mrope_interleaved",
    "mrope_section", "original_max_position_embeddings", "rope_theta", "rope_type", "short_mscale", "type",
}  # fmt: skip


def read_rope(
    config: Fields, default_theta: float, max_position: int, dim: int, head_dim: int, layer_type: str = ""
) -> RopeConfig:
    """Return the rotary embedding of a configuration, with transformers' defaults; ModelError otherwise.

    It turns `dim` of a head's `head_dim` dimensions. `layer_type`: that of the layers, where these differ.
    """
    flat_theta = config.optional_number("rope_theta", 1.0, 1e30)
    flat_original = config.optional_integer("original_max_position_embeddings", 1, LONGEST)
    rope = rope_parameters(config, layer_type)

    theta = rope.number("rope_theta", 1.0, 1e30, default=default_theta if flat_theta is None else flat_theta)
    kind = _kind(rope)
    if kind != "proportional":
        _check_part_of_head(config, rope, dim == head_dim)
    if kind == "default":
        if rope.number("factor", 0, 1e30, default=1.0) != 1.0:
            raise rope.fail("factor", "but the rope type is default; give the type that scales")
        result = RopeConfig(theta)
    elif (
        kind == "dynamic"
    ):  # changes nothing up to max_position_embeddings: longer sequences are not computed
        rope.optional_number("factor", 1e-6, 1e6)
        result = RopeConfig(theta)
    elif kind == "linear":
        result = RopeConfig(theta, "linear", factor=rope.number("factor", 1e-6, 1e6))
    elif kind == "proportional":
        result = _proportional(rope, theta, dim)
    elif kind == "factors":
        result = _factors(rope, theta, dim)
    else:
        # Like transformers: the configuration's own value goes before the rope dict's.
        inner = rope.optional_integer("original_max_position_embeddings", 1, LONGEST)
        original = flat_original or inner or max_position
        if kind == "llama3":
            result = _llama3(rope, theta, original)
        elif kind == "longrope":
            result = _longrope(rope, theta, original, max_position, dim)
        else:
            result = _yarn(rope, theta, original, max_position)

    unknown = sorted(set(rope.unread()) - HARMLESS)
    if unknown:
        raise ModelError(f"{rope.name}: {', '.join(unknown)} is not supported with rope type {kind}.")
    return result


def _table(config: Fields) -> Mapping[str, Any]:
    """Return the dict that holds the rope type and its numbers, or one for each layer type; empty if there is none."""
    old, new = config.table("rope_scaling"), config.table("rope_parameters")
    if old and "rope_parameters" not in config.values:  # it goes before the class's default
        new = {}
    if old and new and old != new:
        raise ModelError(
            f"{config.name}: rope_scaling and rope_parameters are both given and differ; keep one."
        )
    return old or new


def rope_parameters(config: Fields, layer_type: str = "") -> Fields:
    """Return the rope parameters of the layers of one type, or of all layers."""
    return Fields(_parameters(config, layer_type), f"{config.name}, rope parameters")


def _parameters(config: Fields, layer_type: str) -> Mapping[str, Any]:
    values = _table(config)
    if not any(isinstance(value, Mapping) for value in values.values()):
        return values
    if layer_type:
        found = values.get(layer_type)
        if not isinstance(found, Mapping):
            raise ModelError(f"{config.name}: the rope parameters have none for {layer_type}.")
        return found
    # One dict per layer type, for models whose layers may differ: here they have to agree.
    layer_types = config.values.get("layer_types") or ["full_attention"]
    per_type = [values.get(name) for name in layer_types if isinstance(name, str)]
    first = per_type[0] if per_type else None
    if not isinstance(first, Mapping) or any(other != first for other in per_type):
        raise ModelError(f"{config.name}: rope parameters that differ from layer to layer are not supported.")
    return first


def _kind(rope: Fields) -> str:
    kind = rope.raw("rope_type")
    if kind is None:
        kind = rope.raw("type")
    if kind is None:
        if set(rope.values) <= HARMLESS | {"factor", "partial_rotary_factor"}:
            return "default"  # a factor other than 1 is refused there
        raise ModelError(f"{rope.name}: the rope type is missing; it must be one of {', '.join(KINDS[:-1])}.")
    kind = RENAMED.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in KINDS:
        raise ModelError(
            f"{rope.name}: rope type {str(kind)[:40]!r} is not supported (supported: {', '.join(KINDS[:-1])})."
        )
    return str(kind)


def _check_part_of_head(config: Fields, rope: Fields, whole: bool) -> None:
    """Raise ModelError if a part of the head is to rotate, but the family has read the whole head (`whole`)."""
    for fields in (config, rope):
        if fields.number("partial_rotary_factor", 0, 1e6, default=1.0) != 1.0 and whole:
            raise fields.fail(
                "partial_rotary_factor", "but only models that rotate the whole head are supported"
            )


def _llama3(rope: Fields, theta: float, original: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor", 1e-6, 1e6), rope.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise rope.fail("high_freq_factor", f"but must be greater than low_freq_factor ({low:g})")
    return RopeConfig(
        theta,
        "llama3",
        factor=rope.number("factor", 1e-6, 1e6),
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: Fields, theta: float, original: int, max_position: int) -> RopeConfig:
    factor = rope.optional_number("factor", 1e-6, 1e6)
    if factor is None:
        factor = max_position / original
    # Zero means "not given" in transformers, for these four.
    beta_fast = rope.optional_number("beta_fast", 0, 1e6) or 32.0
    beta_slow = rope.optional_number("beta_slow", 0, 1e6) or 1.0
    mscale = rope.optional_number("mscale", 0, 1e6)
    mscale_all_dim = rope.optional_number("mscale_all_dim", 0, 1e6)
    if beta_fast < beta_slow:
        raise rope.fail("beta_fast", f"but must not be less than beta_slow ({beta_slow:g})")
    if theta <= 1.0:
        raise ModelError(f"{rope.name}: rope_theta must be greater than 1 with rope type yarn.")
    scale = rope.optional_number("attention_factor", 0, 1e6)
    return RopeConfig(
        theta,
        "yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=rope.flag("truncate", default=True),
        attention_factor=yarn_attention_factor(factor, mscale, mscale_all_dim) if scale is None else scale,
        score_factor=yarn_scale(factor, mscale_all_dim) ** 2 if mscale_all_dim else 1.0,
    )


def _longrope(rope: Fields, theta: float, original: int, max_position: int, dim: int) -> RopeConfig:
    """LongRoPE (arXiv 2402.13753): divisors for short sequences, and others for those beyond the original length."""
    short = _divisors(rope, "short_factor", dim)
    long = _divisors(rope, "long_factor", dim)
    factor = rope.optional_number("factor", 1e-6, 1e6) or max_position / original
    scale = rope.optional_number("attention_factor", 0, 1e6)
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeConfig(
        theta,
        "longrope",
        original_max_position=original,
        factors=short,
        attention_factor=scale,
        long_factors=long,
        long_attention_factor=scale,
    )


def _proportional(rope: Fields, theta: float, dim: int) -> RopeConfig:
    """Return the frequencies of a whole head: only the first part is used; the others are 0 and rotate nothing."""
    turning = int(rope.number("partial_rotary_factor", 0, 1, default=1.0) * dim // 2)
    factor = rope.number("factor", 1e-6, 1e6, default=1.0)
    factors = (factor,) * turning + (math.inf,) * (dim // 2 - turning)
    return RopeConfig(theta, "factors", factors=factors)


def _factors(rope: Fields, theta: float, dim: int) -> RopeConfig:
    """Divisors given one by one (a GGUF file's rope_freqs.weight)."""
    factors = _divisors(rope, "factors", dim)
    scale = rope.number("attention_factor", 0, 1e6, default=1.0)
    return RopeConfig(theta, "factors", factors=factors, attention_factor=scale)


def _divisors(rope: Fields, key: str, dim: int) -> tuple[float, ...]:
    """Return a divisor for each frequency."""
    factors = rope.raw(key)
    valid = isinstance(factors, list | tuple) and all(
        type(value) in {int, float} and 1e-6 <= value <= 1e38 for value in factors
    )
    if not valid or len(factors) != dim // 2:
        raise ModelError(f"{rope.name}: {key} must be {dim // 2} positive numbers, half the head dimension.")
    return tuple(map(float, factors))
