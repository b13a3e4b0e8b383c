"""Checks of the NumPy kernels' arguments; the compiled module raises the same errors with the same messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.kernels.types import (
    PANEL_COLUMNS,
    Activation,
    BlockType,
    Bounds,
    KvType,
    activation_nbytes,
    check_bounds,
    kv_pools,
    packed_nbytes,
    strided_nbytes,
    used_as_stored,
)

Array = npt.NDArray[Any]


def require(name: str, array: Array, shape: Sequence[int], dtype: type) -> None:
    """Raise ValueError unless the array is C-contiguous and has exactly this shape and type."""
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype).name}, not {array.dtype}")
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(array.shape)}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")


def require_rows(name: str, array: Array, rows: int | None = None, width: int | None = None,
                 dtype: type = np.uint8) -> None:  # fmt: skip
    """Raise ValueError unless each row of the matrix is contiguous; the distance between rows is free."""
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype).name}, not {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, not {array.ndim}")
    want = [len(array) if rows is None else rows, array.shape[1] if width is None else width]
    if list(array.shape) != want:
        raise ValueError(f"{name} must have shape {want}, not {list(array.shape)}")
    if array.size and array.shape[1] > 1 and array.strides[1] != array.itemsize:
        raise ValueError(f"{name} must have contiguous rows")


def require_weights(
    type: BlockType, w: Array, n: int, k: int, bounds: Bounds, row_bytes: int
) -> npt.NDArray[np.int64]:
    """Check the packed bytes of W [n, k], or, if `row_bytes` > 0, its rows at that distance; return the bounds."""
    edges = check_bounds(bounds, k, type.block)
    if row_bytes and (not used_as_stored(type, k, bounds) or row_bytes < type.row_bytes(k)):
        raise ValueError(f"rows of {k} values of block type {type} cannot lie {row_bytes} bytes apart")
    nbytes = strided_nbytes(type, n, k, row_bytes) if row_bytes else packed_nbytes(type, n, k, edges)
    require("w", w, (nbytes,), np.uint8)
    widest = int(np.diff(edges).max())
    if type.whole and widest > PANEL_COLUMNS:
        raise ValueError(f"a panel of block type {type} has at most {PANEL_COLUMNS} columns, not {widest}")
    return edges


def require_activations(type: BlockType, x: Array, k: int, edges: npt.NDArray[np.int64]) -> None:
    """Check the shape and type of x [m, k] for a product with weights of this type."""
    if type.quantised:
        require("x", x, (len(x), activation_nbytes(k, edges, type)), np.uint8)
    else:
        require_rows("x", x, width=k, dtype=np.float32)


def require_pools(kv_type: KvType, kpool: Array, vpool: Array | None, kvh: int, hd: int, vd: int) -> None:
    """Check the pools (see `kv_pools`); if vpool is None, the values are the first vd dimensions of the keys."""
    keys, values = kv_pools(kv_type, len(kpool), kvh, hd, vd)
    require("kpool", kpool, *keys)
    if vpool is not None:
        require("vpool", vpool, *values)
    elif vd > hd:
        raise ValueError(f"values of {vd} dimensions are no part of keys of {hd}")


def require_vector(name: str, array: Array | None, count: int) -> None:
    """Check a float32 vector [count]; None is allowed."""
    if array is not None:
        require(name, array, (count,), np.float32)


def rotary_of(rotary: int, hd: int) -> int:
    """Return how many dimensions of a head are rotated; `rotary` 0 stands for all of them."""
    if hd % 2 and not rotary:
        raise ValueError(f"rope needs an even head dimension, not {hd}")
    if rotary < 0 or rotary % 2 or rotary > hd:
        raise ValueError(f"rope rotates an even number of a head's {hd} dimensions, not {rotary}")
    return rotary or hd


def require_activation(kind: int, gated: bool, limit: float) -> Activation:
    """Return the activation with this number; raise ValueError if it needs a gate or a limit and has none."""
    if not 0 <= kind < len(Activation):
        raise ValueError(f"there is no activation {kind}")
    if kind == Activation.SWIGLU_CLAMPED and not (gated and limit > 0):
        raise ValueError("the clamped SwiGLU needs up and a limit above 0")
    return Activation(kind)


def require_chunks(window: int, chunked: bool) -> None:
    """Raise ValueError if attention is chunked and a chunk has no positions."""
    if chunked and window < 1:
        raise ValueError("chunks are windows: they need a number of positions")


def require_tuning(tuning: tuple[float, int, int] | None) -> None:
    """Raise ValueError unless the length is at least one position and the offset is not negative."""
    if tuning and (tuning[1] < 1 or tuning[2] < 0):
        raise ValueError(
            f"scores cannot be tuned by {tuning}: the length is at least 1, the offset at least 0"
        )


def require_cap(cap: float) -> None:
    """Raise ValueError unless the soft cap is above 0."""
    if not cap > 0:
        raise ValueError(f"a soft cap must be above 0, not {cap}")


def require_sequences(first_rows: Array, slots: Array, rows: int, states: int) -> None:
    """Check that the first sequence begins at row 0, that each has at least one row, and that no two share a slot."""
    count = len(first_rows)
    require("first_rows", first_rows, (count,), np.int32)
    if len(slots) != count:
        raise ValueError(f"slots must have shape [{count}], not [{len(slots)}]")
    require("slots", slots, (count,), np.int32)
    if count and (first_rows[0] or (np.diff([*first_rows, rows]) <= 0).any()):
        raise ValueError(f"first_rows must rise from 0 and end before {rows}: {first_rows.tolist()}")
    if not count and rows:
        raise ValueError(f"{rows} rows belong to no sequence")
    if count and not 0 <= slots.min() <= slots.max() < states:
        raise ValueError(f"slots must be within 0..{states - 1}")
    if len(set(slots.tolist())) < count:
        raise ValueError(f"every sequence has a slot of its own, not {slots.tolist()}")
