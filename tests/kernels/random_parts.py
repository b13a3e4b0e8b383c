"""Random parts of layers: matrices of any type, whole or cut into panels, vectors and norms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpillm import kernels
from mpillm.kernels import BlockType, Norm
from tests.kernels import cases

COMPILED = [name for name in kernels.available() if name != "numpy"]


HD, HEADS, KVH, FFN, BLOCKS = 16, 6, 2, 160, 4


HIDDEN = (70, 256)  # by the seed; K-quants have whole blocks of 256


@dataclass
class Matrix:
    type: BlockType
    n: int
    k: int
    bounds: Any
    data: Any
    parts: tuple[Matrix, ...] = ()
    row_bytes: int = 0


def packed(type: BlockType, raw: Any, k: int, bounds: Any) -> Matrix:
    data = np.empty(kernels.packed_nbytes(type, len(raw), k, bounds), np.uint8)
    kernels.pack(type, np.ascontiguousarray(raw), k, bounds, data)
    return Matrix(type, len(raw), k, np.array(bounds, np.int32), data)


def matrix(
    rng: np.random.Generator, type: BlockType, n: int, k: int, panels: int = 1, cut: str = ""
) -> Matrix:
    """Random weights in one piece, or in two: `rows` one under the other, `columns` side by side."""
    raw = cases.canonical(rng, type, n, k)
    unit = max(32, type.block)
    bounds = [k // unit * p // panels * unit for p in range(panels)] + [k]
    whole = packed(type, raw, k, bounds)
    if cut == "rows":
        parts = (packed(type, raw[: n // 2], k, bounds), packed(type, raw[n // 2 :], k, bounds))
    elif cut == "columns":
        half = bounds[panels // 2]
        left = type.row_bytes(half)
        parts = (
            packed(type, raw[:, :left], half, bounds[: panels // 2 + 1]),
            packed(type, raw[:, left:], k - half, [b - half for b in bounds[panels // 2 :]]),
        )
    else:
        return whole
    return replace(whole, data=whole.data[:0], parts=parts)


def fitting(k: int, number: int) -> BlockType:
    """One of the types that have rows of k values."""
    types = [type for type in BlockType if cases.whole(type, k) == k]
    return types[number % len(types)]


def unfused(kind: type[Any]) -> Any:
    """The twin's class over the compiled single kernels."""
    return type(kind.__name__, (kind,), {"ops": kernels._compiled})


def vector(rng: np.random.Generator, n: int) -> Any:
    return rng.standard_normal(n).astype(np.float32)


def norm_of(rng: np.random.Generator, width: int, number: int) -> Norm | None:
    """None, or one of the four kinds of norms."""
    match number % 5:
        case 0:
            return Norm(width, 1e-5, vector(rng, width))
        case 1:
            return Norm(width, 1e-5, vector(rng, width), vector(rng, width), centred=True)
        case 2:
            return Norm(width, 1e-6)
        case 3:
            return Norm(width, 1e-6, vector(rng, width), centred=True)
    return None


def small_matrix(rng: np.random.Generator, type: BlockType, n: int, k: int, panels: int = 1) -> Matrix:
    """Weights so small that several layers in turn stay finite."""
    values = (rng.standard_normal((n, k)) / 10).astype(np.float32)
    if type == BlockType.F16:
        raw = values.astype(np.float16).view(np.uint8)
    else:
        raw = np.empty((n, type.row_bytes(k)), np.uint8)
        kernels.quantize(type, values, raw)
    return packed(type, raw, k, [k // 32 * p // panels * 32 for p in range(panels)] + [k])
