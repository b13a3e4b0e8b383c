"""Rotary position embedding: the frequencies of every scaling rule, and the cosines and sines of positions.

The formulas are those of transformers' `modeling_rope_utils.py`, in the same float32 operations and the same order
(an angle at position 4096 has few bits left after its point, so a frequency that differs in the last bit shows).
Powers, cosines and sines come from the C library through `math`, in double, rounded once: NumPy's own depend on the
machine's instruction set, and results must not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Floats = NDArray[np.float32]

CHUNK = 256  # positions whose cosines and sines are computed together


@dataclass(frozen=True)
class RopeConfig:
    """A model's rotary embedding, with every default resolved.

    `kind` says which of the other fields count: linear (factor), llama3 (factor, low_freq_factor, high_freq_factor,
    original_max_position), yarn (factor, beta_fast, beta_slow, truncate, original_max_position), factors (factors, one
    divisor per frequency), longrope (factors and attention_factor for sequences of up to original_max_position tokens,
    long_factors and long_attention_factor for all positions of longer ones). `attention_factor` multiplies cosines and
    sines; only yarn, factors and longrope have one. `score_factor` is what yarn's mscale_all_dim multiplies scores by,
    in models that do so (DeepSeek's).
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "factors", "longrope"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    score_factor: float = 1.0
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long_attention_factor: float = 1.0

    @cached_property
    def of_long(self) -> RopeConfig:
        """The RoPE of long sequences; the same object unless it is LongRoPE."""
        if not self.long_factors:
            return self
        return replace(
            self, factors=self.long_factors, attention_factor=self.long_attention_factor, long_factors=()
        )

    @cached_property
    def _hash(self) -> int:
        return hash(astuple(self))

    def __hash__(self) -> int:
        """The hash, computed once: each layer looks up its rows by it at each step."""
        return self._hash


def inv_freq(rope: RopeConfig, head_dim: int) -> Floats:
    """Return the angle per position of each pair of a head's dimensions: f32 [head_dim / 2], scaling applied."""
    powers = _powers(rope.theta, head_dim)
    plain: Floats = F32(1) / powers
    match rope.kind:
        case "default":
            return plain
        case "linear":
            plain /= F32(rope.factor)
            return plain
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, powers)
        case "factors":
            plain /= np.array(rope.factors, F32)
            return plain
        case "longrope":
            stretched: Floats = F32(1) / (np.array(rope.factors, F32) * powers)
            return stretched


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YaRN's scale of cosines and sines where the config does not give one (the paper's, section 3.4)."""
    if mscale and mscale_all_dim:
        return yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all_dim)
    return yarn_scale(factor, 1.0)


def yarn_scale(factor: float, weight: float) -> float:
    """0.1 weight ln(factor) + 1, and 1 for what does not stretch."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _powers(theta: float, head_dim: int) -> Floats:
    """theta ** (2 i / head_dim): f32 [head_dim / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=F32) / F32(head_dim)
    return np.array([math.pow(F32(theta), exponent) for exponent in exponents.tolist()], F32)


def _llama3(rope: RopeConfig, plain: Floats) -> Floats:
    """Llama 3.1's rule: long wavelengths are stretched by the factor, short ones kept, those between mixed."""
    low, high, old = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    # torch divides a number by a tensor as the tensor's reciprocal times the number; so do these two lines.
    wavelength = F32(1) / plain * F32(2 * math.pi)
    smooth = (F32(1) / wavelength * F32(old) - F32(low)) / F32(high - low)
    scaled = np.where(wavelength > F32(old / low), plain / F32(rope.factor), plain)
    mixed = (F32(1) - smooth) * scaled / F32(rope.factor) + smooth * scaled
    between = ~(wavelength < F32(old / high)) & ~(wavelength > F32(old / low))
    return np.where(between, mixed, scaled).astype(F32)


def _yarn(rope: RopeConfig, powers: Floats) -> Floats:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, a linear ramp between."""
    dim = 2 * len(powers)

    def dimension_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    ramp = np.clip((np.arange(len(powers), dtype=F32) - F32(low)) / F32(high - low), F32(0), F32(1))
    keep = F32(1) - ramp
    interpolated = F32(1) / (F32(rope.factor) * powers)
    extrapolated = F32(1) / powers
    mixed: Floats = interpolated * (F32(1) - keep) + extrapolated * keep
    return mixed


class RopeTable:
    """Cosines and sines of one model's positions, computed in chunks when first asked for."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self._inv_freq = inv_freq(rope, head_dim)
        self._scale = F32(rope.attention_factor)
        self._chunks: dict[int, tuple[Floats, Floats]] = {}

    def cos_sin(self, positions: Sequence[int] | NDArray[np.integer]) -> tuple[Floats, Floats]:
        """Cosines and sines of m positions: two f32 [m, head_dim / 2], the attention factor folded in."""
        wanted = np.asarray(positions, np.int64)
        if len(wanted) == 1:  # a sequence that decodes alone waits for this
            number, offset = divmod(int(wanted[0]), CHUNK)
            chunk_cos, chunk_sin = self._chunk(number)
            return chunk_cos[offset : offset + 1], chunk_sin[offset : offset + 1]
        cos = np.empty((len(wanted), len(self._inv_freq)), F32)
        sin = np.empty_like(cos)
        chunk_of = wanted // CHUNK
        for number in np.unique(chunk_of).tolist():
            rows = np.flatnonzero(chunk_of == number)
            offsets = wanted[rows] - number * CHUNK
            chunk_cos, chunk_sin = self._chunk(number)
            cos[rows] = chunk_cos[offsets]
            sin[rows] = chunk_sin[offsets]
        return cos, sin

    def _chunk(self, number: int) -> tuple[Floats, Floats]:
        chunk = self._chunks.get(number)
        if chunk is None:
            first = number * CHUNK
            angles = np.arange(first, first + CHUNK).astype(F32)[:, None] * self._inv_freq
            flat = angles.ravel().tolist()
            cos = np.fromiter(map(math.cos, flat), F32, len(flat)).reshape(angles.shape) * self._scale
            sin = np.fromiter(map(math.sin, flat), F32, len(flat)).reshape(angles.shape) * self._scale
            chunk = self._chunks[number] = (cos, sin)
        return chunk


@lru_cache(maxsize=8)
def rope_table(rope: RopeConfig, head_dim: int) -> RopeTable:
    """Return the table of a model's rotary embedding; asked again, the same one."""
    return RopeTable(rope, head_dim)


def cos_sin(
    rope: RopeConfig,
    head_dim: int,
    positions: Sequence[int] | NDArray[np.integer],
    long: NDArray[np.bool_] | None = None,
) -> tuple[Floats, Floats]:
    """Cosines and sines of m positions: two f32 [m, head_dim / 2], the attention factor folded in.

    `long` says which of them are of long sequences (LongRoPE); None: none is.
    """
    cos, sin = rope_table(rope, head_dim).cos_sin(positions)
    if long is None or rope.of_long is rope:
        return cos, sin
    long_cos, long_sin = rope_table(rope.of_long, head_dim).cos_sin(positions)
    return np.where(long[:, None], long_cos, cos), np.where(long[:, None], long_sin, sin)
