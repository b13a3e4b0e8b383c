"""Blocks in NumPy: quantise and dequantise them, interleave 16 rows of weights, and group rows of activations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.kernels import scaled_blocks, super_blocks
from mpillm.kernels.coded import code_panel
from mpillm.kernels.lanes import fma
from mpillm.kernels.types import (
    ACTIVATION_BLOCK_BYTES,
    F32,
    OUTLIER,
    PANEL_ROW,
    QUANT_BLOCK,
    ROW_GROUP,
    TILE_ROWS,
    U8,
    BlockType,
    Bounds,
    check_bounds,
)

ACTIVATION = np.dtype(
    [
        ("q", "i1", QUANT_BLOCK),
        ("scale", "<f4"),
        ("total", "<f4"),
        ("offset8", "<i4"),
        ("offset128", "<i4"),
        ("offset32", "<i2", (2, 2)),
    ]
)
assert ACTIVATION.itemsize == ACTIVATION_BLOCK_BYTES
PANEL_ACTIVATION = np.dtype(
    [("scale", "<f4"), ("offset128", "<i4"), ("high128", "<i4"), ("group", "<i4"), ("high", "i1", 16)]
)
assert PANEL_ACTIVATION.itemsize == PANEL_ROW
PACKED = {
    BlockType.Q8_0: np.dtype([("d", "<f2", TILE_ROWS), ("q", "u1", (8, TILE_ROWS, 4))]),
    BlockType.Q4_0: np.dtype([("d", "<f2", TILE_ROWS), ("q", "u1", (4, TILE_ROWS, 4))]),
    BlockType.Q4_1: np.dtype(
        [("d", "<f2", TILE_ROWS), ("m", "<f2", TILE_ROWS), ("q", "u1", (4, TILE_ROWS, 4))]
    ),
    BlockType.MXFP4: np.dtype([("e", "u1", TILE_ROWS), ("q", "u1", (4, TILE_ROWS, 4))]),
    BlockType.IQ4_NL: np.dtype([("d", "<f2", TILE_ROWS), ("q", "u1", (4, TILE_ROWS, 4))]),
    BlockType.Q5_0: np.dtype([("d", "<f2", TILE_ROWS), ("q", "u1", (5, TILE_ROWS, 4))]),
    BlockType.Q5_1: np.dtype(
        [("d", "<f2", TILE_ROWS), ("m", "<f2", TILE_ROWS), ("q", "u1", (5, TILE_ROWS, 4))]
    ),
    **super_blocks.PACKED,
    **scaled_blocks.BLOCKS,
}
CANONICAL = {
    BlockType.Q8_0: np.dtype([("d", "<f2"), ("q", "u1", 32)]),
    BlockType.Q4_0: np.dtype([("d", "<f2"), ("q", "u1", 16)]),
    BlockType.Q4_1: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    BlockType.MXFP4: np.dtype([("e", "u1"), ("q", "u1", 16)]),
    BlockType.IQ4_NL: np.dtype([("d", "<f2"), ("q", "u1", 16)]),
    BlockType.Q5_0: np.dtype([("d", "<f2"), ("high", "u1", 4), ("q", "u1", 16)]),
    BlockType.Q5_1: np.dtype([("d", "<f2"), ("m", "<f2"), ("high", "u1", 4), ("q", "u1", 16)]),
    BlockType.W8A8: np.dtype([("d", "<f4"), ("q", "u1", 32)]),
    **super_blocks.CANONICAL,
    **scaled_blocks.BLOCKS,
}
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # doubled


def round_away(x: F32) -> F32:
    """Nearest integer of each value, halves away from zero (C's roundf)."""
    whole = np.trunc(x)
    away: F32 = np.where(np.abs(x - whole) >= np.float32(0.5), whole + np.copysign(np.float32(1), x), whole)
    return away


def _inverse(d: F32) -> F32:
    """Return 1/d, or 0 where that is not finite, so that the integers of such a block are 0."""
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / d
    usable: F32 = np.where(np.isfinite(inverse), inverse, np.float32(0))
    return usable


def quantise_q8(x: F32) -> tuple[F32, npt.NDArray[np.int8]]:
    """Scales [...] and integers [..., 32] of blocks x [..., 32]; a block with inf or NaN gets scale NaN and zeros."""
    with np.errstate(all="ignore"):
        d = np.abs(x).max(axis=-1) / np.float32(127)
        d = np.where(np.isfinite(x).all(axis=-1), d, np.float32(np.nan)).astype(np.float32)
        q = round_away(np.where(np.isnan(d[..., None]), np.float32(0), x * _inverse(d)[..., None]))
    return d, q.astype(np.int8)


def quantise_q4(x: F32) -> tuple[F32, U8]:
    """Scales [...] and nibbles [..., 32] of blocks x [..., 32] (ggml's Q4_0: the largest value becomes -8)."""
    peak = np.abs(x).argmax(axis=-1)[..., None]
    with np.errstate(all="ignore"):
        d = (np.take_along_axis(x, peak, -1)[..., 0] + np.float32(0)) / np.float32(-8)  # -0.0 counts as 0.0
        finite = np.asarray(np.isfinite(x).all(axis=-1, keepdims=True))
        d = np.where(finite[..., 0], d, np.float32(np.nan)).astype(np.float32)
        clean = np.where(finite, x, np.float32(0))
        q = np.clip(np.trunc(fma(clean, _inverse(d)[..., None], 8.5)), 0, 15)
    return d, q.astype(np.uint8)


def to_f16(d: F32) -> npt.NDArray[np.float16]:
    """Return each value rounded to the nearest F16, ties to even; too large a value becomes inf without a warning."""
    with np.errstate(all="ignore"):
        return d.astype(np.float16)


def panels_of(x: F32, edges: npt.NDArray[np.int64]) -> Iterator[F32]:
    """Yield each panel's columns of x, filled up to whole blocks of 32 with zeros."""
    for begin, end in itertools.pairwise(edges):
        padded = np.zeros((len(x), -(-(end - begin) // QUANT_BLOCK) * QUANT_BLOCK), np.float32)
        padded[:, : end - begin] = x[:, begin:end]
        yield padded


def quantise_weights(x: F32, edges: npt.NDArray[np.int64]) -> U8:
    """Canonical rows of W8A8 of x [n, k]: each row has one scale for each panel."""
    panels = []
    for panel in panels_of(x, edges):
        made = np.empty((len(x), panel.shape[1] // QUANT_BLOCK), CANONICAL[BlockType.W8A8])
        if panel.size:
            d, q = quantise_q8(panel)
            made["d"], made["q"] = d[:, None], q.view(np.uint8).reshape(*made.shape, QUANT_BLOCK)
        panels.append(made)
    return np.concatenate(panels, axis=1).view(np.uint8).reshape(len(x), -1)


def quantise_rows(x: F32, bounds: Bounds, type: BlockType = BlockType.Q8_0) -> U8:
    """Quantise x [m, k] to uint8 [m, activation_nbytes(k, bounds, type)], with rows in groups.

    `ungrouped` undoes that, for W8A8 `whole_activations`.
    """
    edges = check_bounds(bounds, x.shape[1], 1)
    if type.whole:
        return _quantise_whole(x, edges)
    blocks = np.concatenate(list(panels_of(x, edges)), axis=1).reshape(len(x), -1, QUANT_BLOCK)
    out = np.empty(blocks.shape[:2], ACTIVATION)
    out["scale"], out["q"] = quantise_q8(blocks)
    total = out["q"].sum(axis=-1, dtype=np.int32)
    with np.errstate(all="ignore"):
        out["total"] = out["scale"] * total.astype(np.float32)
    out["offset8"], out["offset128"] = -8 * total, -128 * total
    pairs = out["q"].reshape(*blocks.shape[:2], 2, 4, 2, 2)  # halves, groups of 4 columns, pairs of these
    out["offset32"] = -32 * pairs.sum(axis=(-3, -1), dtype=np.int16)
    groups = [out[row : row + ROW_GROUP].T.reshape(-1) for row in range(0, len(out), ROW_GROUP)]
    return np.concatenate(groups).view(np.uint8).reshape(len(x), -1)


def _quantise_whole(x: F32, edges: npt.NDArray[np.int64]) -> U8:
    """Of each group of rows, panel by panel: what each row has for it, then 32 integers of each in turn."""
    out = []
    for row in range(0, len(x), ROW_GROUP):
        for panel in panels_of(x[row : row + ROW_GROUP], edges):
            head, q = quantise_panel(panel)
            blocks = q.view(np.uint8).reshape(len(q), -1, QUANT_BLOCK)
            out += [head.view(np.uint8), blocks.swapaxes(0, 1).reshape(-1)]
    return np.concatenate(out).reshape(len(x), -1)


def quantise_panel(x: F32) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int8]]:
    """Return the scales and other facts of rows [m] for one panel x [m, k] for W8A8, and their int8 [m, k].

    The scale is that of all values but the largest, whose integer is that int8 and 128 times the one of `high`.
    """
    head, rows = np.zeros(len(x), PANEL_ACTIVATION), np.arange(len(x))
    if not x.shape[1]:
        return head, np.zeros(x.shape, np.int8)
    sizes = np.abs(x)
    largest = sizes.argmax(axis=-1)
    most, rest = sizes[rows, largest], sizes.copy()
    rest[rows, largest] = 0
    with np.errstate(all="ignore"):
        d = np.maximum(rest.max(axis=-1) / np.float32(127), most / np.float32(OUTLIER))
        finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(x).all(axis=-1))
        head["scale"] = np.where(finite, d, np.float32(np.nan))
        whole = round_away(np.where(finite[:, None], x * _inverse(head["scale"])[:, None], np.float32(0)))
    q = whole.astype(np.int32)
    high = (q[rows, largest] + 64) >> 7
    q[rows, largest] -= 128 * high
    head["group"], head["high128"] = np.where(finite & (most > 0), largest // 4, 0), -128 * high
    head["high"][rows, largest % 4] = high
    head["offset128"] = -128 * q.sum(axis=-1, dtype=np.int32)
    return head, q.astype(np.int8)


def whole_activations(
    x: npt.NDArray[Any], edges: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.void], npt.NDArray[np.int8]]]:
    """Yield the facts of rows [m] for each panel, and their int8 [m, .], from `quantise_rows`'s blocks for W8A8."""
    begin = 0
    for width in (-(-np.diff(edges) // QUANT_BLOCK) * QUANT_BLOCK).tolist():
        heads, integers = [], []
        for row in range(0, len(x), ROW_GROUP):
            rows = min(ROW_GROUP, len(x) - row)
            group = x[row : row + rows].reshape(-1)[rows * begin :]
            heads.append(group[: rows * PANEL_ROW].view(PANEL_ACTIVATION))
            q = (
                group[rows * PANEL_ROW : rows * (PANEL_ROW + width)]
                .view(np.int8)
                .reshape(-1, rows, QUANT_BLOCK)
            )
            integers.append(q.swapaxes(0, 1).reshape(rows, -1))
        begin += PANEL_ROW + width
        yield np.concatenate(heads), np.concatenate(integers)


def rounded(x: F32) -> F32:
    """Round each value to the nearest BF16, ties to even; the result is float32, and NaNs stay NaNs."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)
    kept: F32 = (np.where(np.isnan(x), bits | 0x400000, nearest) & np.uint32(0xFFFF0000)).view(np.float32)
    return kept


def ungrouped(x: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    """Return grouped activations as [m, blocks]; within a group, each stored block has the values of all rows."""
    grouped = x.view(ACTIVATION)
    rows = np.empty_like(grouped)
    for row in range(0, len(x), ROW_GROUP):
        part = grouped[row : row + ROW_GROUP]
        rows[row : row + ROW_GROUP] = part.reshape(part.shape[::-1]).T
    return rows


def nibbles(q: U8) -> U8:
    """Unpack canonical bytes [..., 16] to values [..., 32]; the low nibbles are the first half."""
    return np.concatenate([q & 15, q >> 4], axis=-1)


def plain_scales(type: BlockType, blocks: npt.NDArray[np.void]) -> F32:
    """Return the scale of each block as float32; for MXFP4 it is 2**(e - 128), because `E2M1` has doubled values."""
    if type == BlockType.MXFP4:
        scales: F32 = np.ldexp(np.float32(1), blocks["e"].astype(np.int32) - 128)
    else:
        scales = blocks["d"].astype(np.float32)
    return scales


def plain_integers(type: BlockType, q: U8, high: U8 | None = None) -> npt.NDArray[np.int8]:
    """Return the integers int8 [..., 32] of blocks, before scaling.

    `q` has the blocks' bytes, and `high` the fifth bits of Q5_0 and Q5_1 [..., 32].
    """
    if type in (BlockType.Q8_0, BlockType.W8A8):
        return q.view(np.int8)
    values = nibbles(q).view(np.int8)
    if high is not None:
        values = values | high.view(np.int8) << 4
    match type:
        case BlockType.Q4_0:
            values = values - np.int8(8)
        case BlockType.Q5_0:
            values = values - np.int8(16)
        case BlockType.MXFP4:
            values = E2M1[values]
        case BlockType.IQ4_NL:
            values = super_blocks.IQ4[values]
    return values


def fifth_bits(blocks: npt.NDArray[np.void]) -> U8 | None:
    """Return the fifth bits of the values of canonical blocks, uint8 [..., 32], or None if the type has none."""
    if "high" not in (blocks.dtype.names or ()):
        return None
    return np.unpackbits(np.ascontiguousarray(blocks["high"]), axis=-1, bitorder="little")


def decode(type: BlockType, canonical: U8, k: int) -> F32:
    """Dequantise canonical rows uint8 [n, row_bytes] to f32 [n, k]."""
    canonical = np.ascontiguousarray(canonical)
    if type == BlockType.F32:
        return canonical.view("<f4")[:, :k]
    if type == BlockType.F16:
        return canonical.view("<f2")[:, :k].astype(np.float32)
    if type.multiplied_as == BlockType.BF16:
        return (canonical.view("<u2")[:, :k].astype(np.uint32) << 16).view(np.float32)
    blocks = canonical.view(CANONICAL[type])
    if type.k_quant:
        return super_blocks.decode_super(type, blocks).reshape(len(canonical), -1)
    if type.scaled:
        with np.errstate(invalid="ignore", over="ignore"):
            values = scaled_blocks.units(type, blocks)[..., None] * scaled_blocks.numbers(type, blocks)
        return values.reshape(len(canonical), -1)[:, :k]
    with np.errstate(invalid="ignore", over="ignore"):
        d, q = plain_scales(type, blocks)[..., None], plain_integers(type, blocks["q"], fifth_bits(blocks))
        values = d * q
        if "m" in (blocks.dtype.names or ()):
            values = fma(d, q, blocks["m"].astype(np.float32)[..., None])
    return values.reshape(len(canonical), -1)[:, :k]


def interleaved_whole(source: npt.NDArray[np.void]) -> U8:
    """Tiles [tiles, bytes] of a panel of W8A8 of its blocks [tile, block, row]: scales, then words of values."""
    scales = np.zeros((len(source), TILE_ROWS), np.float32)
    if source.shape[1]:
        scales[:] = source["d"][:, 0]
    words = source["q"].reshape(*source.shape, 8, 4).transpose(0, 1, 3, 2, 4).reshape(len(source), -1)
    return np.concatenate([scales.view(np.uint8), words], axis=1)


def interleave(type: BlockType, canonical: U8, bounds: npt.NDArray[np.int64]) -> list[U8]:
    """Pack canonical rows uint8 [n, row bytes]; return the packed bytes of each column panel.

    `bounds` [panels + 1] are the first columns of the panels, and k.
    """
    if type.coded:
        rows = np.ascontiguousarray(canonical).view("<u2")
        return [code_panel(rows[:, begin:end]) for begin, end in itertools.pairwise(bounds)]
    if not type.quantised:
        edges = -(-bounds // type.block) * type.block_bytes
        return [canonical[:, begin:end].reshape(-1) for begin, end in itertools.pairwise(edges)]
    n = len(canonical)
    tiles = -(-n // TILE_ROWS)
    padded = np.zeros((tiles * TILE_ROWS, canonical.shape[1]), np.uint8)
    padded[:n] = canonical
    blocks = padded.reshape(tiles, TILE_ROWS, -1, type.block_bytes)
    panels = []
    for begin, end in itertools.pairwise(bounds):
        # [tile, block, row, byte]
        part = blocks[:, :, begin // type.block : -(-end // type.block)].transpose(0, 2, 1, 3)
        source = np.ascontiguousarray(part).view(CANONICAL[type])[..., 0]
        if type.whole:
            panels.append(interleaved_whole(source).reshape(-1))
            continue
        if type.k_quant:
            panels.append(super_blocks.interleaved_super(type, source).view(np.uint8).reshape(-1))
            continue
        packed = np.empty(source.shape[:2], PACKED[type])
        for field in set(source.dtype.names or ()) - {"q", "high"}:
            packed[field] = source[field]
        words = source["q"].reshape(*source.shape, source.dtype["q"].shape[0] // 4, 4)
        if (high := fifth_bits(source)) is not None:
            words = np.concatenate([words, super_blocks.field_of(high, 1)], axis=-2)
        packed["q"] = words.transpose(0, 1, 3, 2, 4)
        panels.append(packed.view(np.uint8).reshape(-1))
    return panels
