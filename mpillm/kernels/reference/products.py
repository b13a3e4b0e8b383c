"""Packing of weights, quantisation, and products; see `reference` for how results compare with the compiled kernels."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.kernels import blocks, coded, lanes, scaled_blocks, super_blocks
from mpillm.kernels.checks import (
    require,
    require_activations,
    require_rows,
    require_weights,
)
from mpillm.kernels.types import (
    BF16_BLOCK,
    F32,
    PAIRED,
    QUANT_BLOCK,
    TILE_ROWS,
    U8,
    BlockType,
    Bounds,
    activation_nbytes,
    check_bounds,
    check_whole,
    packed_nbytes,
    strided_nbytes,
    tile_nbytes,
)

LANES = 2**18  # floats of a temporary array, at most about


def pack(
    type: BlockType,
    canonical: U8,
    k: int,
    bounds: Bounds,
    out: U8,
    threads: int = 1,
    stored: BlockType | None = None,
    first: int = 0,
    whole: int | None = None,
    head: int = 0,
) -> None:
    """Pack canonical rows uint8 [n, row bytes], which are the rows from `first` on of a matrix of `whole` rows.

    Each column panel is contiguous in `out`. Rows of floats keep their form; rows of other types are interleaved by 16.
    `stored` is the type of the input if it differs from `type`: floats, which are quantised. With `head` > 0 the input
    has llama.cpp's order of the rows of q and k: row (head, half, j), of heads of `head` rows, is at (head, j, half).
    """
    type, stored = BlockType(type), BlockType(type if stored is None else stored)
    edges = check_bounds(bounds, k, type.block)
    n, rows = len(canonical), first + len(canonical) if whole is None else whole
    if type.coded and stored == type.multiplied_as:
        stored = type
    if stored != type and (stored.block > 1 or type not in (BlockType.Q8_0, BlockType.Q4_0, BlockType.W8A8)):
        raise ValueError(
            f"pack makes Q8_0, Q4_0 or W8A8 of F32, F16 or BF16, not block type {type} of {stored}"
        )
    require_rows("canonical", canonical, width=stored.row_bytes(k))
    if first < 0 or first % TILE_ROWS or first + n > rows or (n % TILE_ROWS and first + n < rows):
        raise ValueError(f"rows {first} to {first + n} are no whole tiles of {rows} rows")
    if head < 0 or head % 2 or (head and n % head):
        raise ValueError(f"{n} rows are no whole heads of two halves: {head} rows each")
    require("out", out, (packed_nbytes(type, rows, k, edges),), np.uint8)
    if head:
        shape = n // head, head // 2, 2, canonical.shape[1]
        canonical = np.ascontiguousarray(canonical).reshape(shape).swapaxes(1, 2).reshape(n, shape[3])
    if stored != type:
        values = np.empty((n, k), np.float32)
        dequantize(stored, np.ascontiguousarray(canonical), k, values)
        if type.whole:
            canonical = blocks.quantise_weights(values, edges)
        else:
            canonical = np.empty((n, type.row_bytes(k)), np.uint8)
            quantize(type, values, canonical)
    unit, begin = TILE_ROWS if type.quantised or type.coded else 1, 0
    there, all_rows = (-(-count // unit) * unit for count in (n, rows))
    for panel in blocks.interleave(type, canonical, edges):
        row = panel.nbytes // max(there, 1)
        out[begin + first * row :][: panel.nbytes] = panel
        begin += all_rows * row


def quantize(type: BlockType, x: F32, out: U8, threads: int = 1) -> None:
    """Quantise x f32 [n, k] to canonical Q8_0 or Q4_0 rows, with the rounding of ggml's reference."""
    type = BlockType(type)
    if type not in (BlockType.Q8_0, BlockType.Q4_0):
        raise ValueError(f"quantize makes Q8_0 or Q4_0, not {type.name}")
    require_rows("x", x, dtype=np.float32)
    require("out", out, (len(x), type.row_bytes(x.shape[1])), np.uint8)
    count = -(-x.shape[1] // QUANT_BLOCK)
    padded = np.zeros((len(x), count * QUANT_BLOCK), np.float32)
    padded[:, : x.shape[1]] = x
    values = padded.reshape(len(x), count, QUANT_BLOCK)
    made = np.empty((len(x), count), blocks.CANONICAL[type])
    if type == BlockType.Q8_0:
        d, q = blocks.quantise_q8(values)
        made["q"] = q.view(np.uint8)
    else:
        d, half = blocks.quantise_q4(values)
        made["q"] = half[..., :16] | half[..., 16:] << 4
    made["d"] = blocks.to_f16(d)
    out[:] = made.view(np.uint8).reshape(out.shape)


def dequantize(type: BlockType, canonical: U8, k: int, out: F32, threads: int = 1) -> None:
    """Dequantise canonical rows of any type to f32 [n, k]."""
    type = BlockType(type)
    require_rows("canonical", canonical, width=type.row_bytes(k))
    require_rows("out", out, rows=len(canonical), width=k, dtype=np.float32)
    if type.k_quant:
        check_whole(k)
    out[:] = blocks.decode(type, canonical, k)


def quantize_rows(
    x: F32, bounds: Bounds, out: U8, threads: int = 1, type: BlockType = BlockType.Q8_0
) -> None:
    """Quantise activations x f32 [m, k] to the integers that `matmul` takes with weights of a quantised type."""
    type = BlockType(type)
    if not type.quantised:
        raise ValueError(f"activations for block type {type} are floats")
    require_rows("x", x, dtype=np.float32)
    require("out", out, (len(x), activation_nbytes(x.shape[1], bounds, type)), np.uint8)
    out[:] = blocks.quantise_rows(x, bounds, type)


def matmul(type: BlockType, w: U8, n: int, k: int, bounds: Bounds, x: npt.NDArray[np.generic], out: F32,
           threads: int = 1, fold: bool = True, row_bytes: int = 0) -> None:  # fmt: skip
    """out [m, n] = x [m, k] @ W[n, k].T; with fold=False, out [P, m, n] are the sums of the column panels.

    `row_bytes` > 0 is the distance between the rows in w, as in a file; 0 means that w is packed.
    """
    type = BlockType(type)
    edges = require_weights(type, w, n, k, bounds, row_bytes)
    require_activations(type, x, k, edges)
    parts = len(edges) - 1
    if fold:
        require_rows("out", out, rows=len(x), width=n, dtype=np.float32)
    else:
        require("out", out, (parts, len(x), n), np.float32)
    sums = np.empty((parts, len(x), n), np.float32)
    if type.quantised:
        w = _packed(type, w, n, k, bounds, row_bytes) if row_bytes else w
        panels = _whole_panels if type.whole else _quantised_panels
        panels(type, w, n, edges, x, sums)
    else:
        _unquantised_panels(type, w, n, edges, x, row_bytes, sums)
    out[...] = lanes.tree(sums) if fold else sums


def _packed(type: BlockType, w: U8, n: int, k: int, bounds: Bounds, row_bytes: int) -> U8:
    rows = np.lib.stride_tricks.as_strided(w, (n, type.row_bytes(k)), (row_bytes, 1))
    out = np.empty(packed_nbytes(type, n, k, bounds), np.uint8)
    pack(type, rows, k, bounds, out)
    return out


def _quantised_panels(
    type: BlockType, w: U8, n: int, edges: npt.NDArray[np.int64], x: npt.NDArray[Any], sums: F32
) -> None:
    tiles, rows = -(-n // TILE_ROWS), blocks.ungrouped(x)
    start = column = 0
    for p, width in enumerate(np.diff(edges).tolist()):
        count, nbytes = -(-width // type.block), tiles * tile_nbytes(type, width)
        panel = w[start : start + nbytes]
        product = _k_quants if type.k_quant else _quantised
        parts = count * (type.block // QUANT_BLOCK)
        sums[p] = product(type, panel, tiles, count, rows[:, column : column + parts])[:, :n]
        start, column = start + nbytes, column + parts


def _whole_panels(
    type: BlockType, w: U8, n: int, edges: npt.NDArray[np.int64], x: npt.NDArray[Any], sums: F32
) -> None:
    """Integer products use float64 BLAS, which is exact; each is multiplied by both scales at once."""
    tiles, start = -(-n // TILE_ROWS), 0
    for p, (of, q) in enumerate(blocks.whole_activations(x, edges)):
        size = tile_nbytes(type, q.shape[1])
        panel = w[start : start + tiles * size].reshape(tiles, size)
        start += tiles * size
        scales = np.ascontiguousarray(panel[:, : 4 * TILE_ROWS]).view(np.float32).reshape(-1)
        words = panel[:, 4 * TILE_ROWS :].view(np.int8).reshape(tiles, -1, TILE_ROWS, 4)
        values = words.swapaxes(1, 2).reshape(tiles * TILE_ROWS, -1)
        if not q.shape[1]:
            sums[p] = 0
            continue
        dots = (q.astype(np.float64) @ values.T.astype(np.float64)).astype(np.float32)
        # [row of W, row of x, column of the group]
        columns = values.reshape(len(values), -1, 4)[:, of["group"]].astype(np.int32)
        high = (columns * of["high"][:, :4]).sum(axis=-1).T.astype(np.float32)
        with np.errstate(all="ignore"):
            sums[p] = (lanes.fma(high, np.float32(128), dots) * (scales * of["scale"][:, None]))[:, :n]


def _unquantised_panels(
    type: BlockType,
    w: U8,
    n: int,
    edges: npt.NDArray[np.int64],
    x: npt.NDArray[Any],
    row_bytes: int,
    sums: F32,
) -> None:
    start = 0
    if type.coded:
        w, type = _decoded(w, n, edges), type.multiplied_as
    for p, (begin, end) in enumerate(itertools.pairwise(edges.tolist())):
        width = type.row_bytes(end - begin)
        apart = row_bytes or width
        nbytes = strided_nbytes(type, n, end - begin, apart)
        panel = np.lib.stride_tricks.as_strided(
            w[start : start + nbytes], (n, width), (apart, 1), writeable=False
        )
        start += width if row_bytes else nbytes
        rows = blocks.rounded(x[:, begin:end]) if type == BlockType.BF16 else x[:, begin:end]
        product = _scaled if type.scaled else _unquantised
        sums[p] = product(type, panel, end - begin, rows)


def _decoded(w: U8, n: int, edges: npt.NDArray[np.int64]) -> U8:
    """Decode BF12 panels to BF16 panels."""
    panels, start = [], 0
    for width in np.diff(edges).tolist():
        nbytes = packed_nbytes(BlockType.BF12, n, width, [0, width])
        panels.append(coded.decode_panel(w[start : start + nbytes], n, width).view(np.uint8).reshape(-1))
        start += nbytes
    return np.concatenate(panels)


def _quantised(type: BlockType, panel: U8, tiles: int, count: int, act: npt.NDArray[Any]) -> F32:
    """Return panel sums [m, tiles * 16]. Integer dot products use float32 BLAS, which is exact below 2**24."""
    w = panel.view(blocks.PACKED[type]).reshape(tiles, count)
    # [block, row, byte]
    q = w["q"].transpose(1, 0, 3, 2, 4).reshape(count, tiles * TILE_ROWS, w["q"].shape[2] * 4)
    low, high = q, None
    if type in (BlockType.Q5_0, BlockType.Q5_1):
        low, high = q[..., :16], super_blocks.columns_of(q[..., None, 16:], 1)
    values = blocks.plain_integers(type, low, high)
    scales = blocks.plain_scales(type, w)
    dots = np.matmul(
        act["q"].transpose(1, 0, 2).astype(np.float32), values.astype(np.float32).transpose(0, 2, 1)
    )
    acc = np.zeros((len(act), tiles * TILE_ROWS), np.float32)
    with np.errstate(all="ignore"):
        for b in range(count):
            scale = act["scale"][:, b, None]
            acc = lanes.fma(dots[b], scales[:, b].reshape(-1) * scale, acc)
            if type in (BlockType.Q4_1, BlockType.Q5_1):
                acc = lanes.fma(w["m"][:, b].reshape(-1).astype(np.float32), act["total"][:, b, None], acc)
    return acc


def _k_quants(type: BlockType, panel: U8, tiles: int, count: int, act: npt.NDArray[Any]) -> F32:
    """Return panel sums as `_quantised` does, in parts of 32 columns, whose halves may have different scales."""
    w = panel.view(blocks.PACKED[type]).reshape(tiles, count)
    acc = np.zeros((len(act), tiles * TILE_ROWS), np.float32)
    with np.errstate(all="ignore"):
        for b, s in itertools.product(range(count), range(super_blocks.PARTS)):
            part = act[:, b * super_blocks.PARTS + s]
            words = w["q"][:, b, s].swapaxes(1, 2)  # tile, row, word, byte
            words = words.reshape(tiles * TILE_ROWS, *words.shape[2:])
            small = np.ascontiguousarray(w["scales"][:, b, s].swapaxes(1, 2))
            small = small.reshape(tiles * TILE_ROWS, small.shape[2])
            q, small_scale, minimum = super_blocks.meaning(type, words, small)
            d, scale = super_blocks.block_scale(type, w[:, b]).reshape(-1), part["scale"][:, None]
            m = w["m"][:, b].reshape(-1).astype(np.float32) if minimum is not None else d
            values, wanted = q.astype(np.float32), part["q"].astype(np.float32)
            if type not in super_blocks.HALVED:
                acc = lanes.fma(wanted @ values.T, d * small_scale[:, 0] * scale, acc)
                if minimum is not None:
                    acc = lanes.fma(-(m * minimum[:, 0]), part["total"][:, None], acc)
                continue
            first, second = (wanted[:, h] @ values[:, h].T for h in (slice(16), slice(16, None)))
            acc = lanes.fma(first * small_scale[:, 0] + second * small_scale[:, 1], d * scale, acc)
            if minimum is not None:
                sums = part["offset32"].astype(np.float32).sum(axis=-1) @ minimum.T.astype(np.float32)
                acc = lanes.fma(sums, m / np.float32(32) * scale, acc)
    return acc


def _scaled(type: BlockType, panel: U8, count: int, x: F32) -> F32:
    """Return panel sums [m, n]: each block is summed from zero in 16 lanes, then multiplied by its scale."""
    shape = -(-count // type.block), type.block // TILE_ROWS, TILE_ROWS
    w = np.ascontiguousarray(panel).view(blocks.CANONICAL[type])
    values = scaled_blocks.numbers(type, w).reshape(len(w), *shape)
    padded = np.zeros((len(x), shape[0] * type.block), np.float32)
    padded[:, :count] = x
    rows, factors = padded.reshape(len(x), 1, *shape), scaled_blocks.units(type, w)
    total = np.zeros((len(x), len(w), TILE_ROWS), np.float32)
    with np.errstate(all="ignore"):
        for b in range(shape[0]):
            acc = np.zeros_like(total)
            for step in range(-(-min(count - b * type.block, type.block) // TILE_ROWS)):
                acc = lanes.fma(values[:, b, step], rows[:, :, b, step], acc)
            total = lanes.fma(acc, factors[:, b, None], total)
    return lanes.halves(total, np.add)


def _unquantised(type: BlockType, panel: U8, count: int, x: F32) -> F32:
    """Return panel sums [m, n] in 16 lanes; for BF16 each block is summed from zero, and added to 8 lanes."""
    paired = type == BlockType.BF16
    step = PAIRED if paired else TILE_ROWS
    steps = -(-count // step)
    w, rows = np.zeros((len(panel), steps * step), np.float32), np.zeros((len(x), steps * step), np.float32)
    w[:, :count], rows[:, :count] = blocks.decode(type, panel, count), x
    if paired:  # the processor's BF16 products treat denormals as zeros
        for a in (w, rows):
            a[np.abs(a) < np.finfo(np.float32).tiny] = 0
    # [step, half of a pair, row, lane]; lane j sums column j, or columns 2 j + 1 and 2 j
    w, rows = (
        np.ascontiguousarray(
            a.reshape(len(a), steps, TILE_ROWS, step // TILE_ROWS)[..., ::-1].transpose(1, 3, 0, 2)
        )
        for a in (w, rows)
    )
    sums = np.empty((len(x), len(panel)), np.float32)
    # A few rows of x at a time, so that their lanes fit into a cache.
    few = max(LANES // (len(panel) * TILE_ROWS + 1), 1)
    with np.errstate(all="ignore"):
        for first in range(0, len(x), few):
            part = rows[:, :, first : first + few, None]
            acc = np.zeros((part.shape[2], len(panel), TILE_ROWS), np.float32)
            product, total = np.empty_like(acc), np.zeros_like(acc[..., : TILE_ROWS // 2])
            for i, half in itertools.product(range(steps), range(w.shape[1])):
                np.multiply(w[i, half], part[i, half], out=product)
                acc += product
                if paired and half and ((i + 1) % (BF16_BLOCK // PAIRED) == 0 or i + 1 == steps):
                    total += acc[..., :8] + acc[..., 8:]
                    acc[:] = 0
            sums[first : first + few] = lanes.halves(total if paired else acc, np.add)
    return sums
