"""The kernels in NumPy: same names, arguments and orders of summation as the compiled module.

They serve where nothing could be compiled, and tests compare the compiled ones with them.  Differences: products of
unquantised types and attention round after the multiplication (no fma), and fma elsewhere may round ties twice; so
results agree with the compiled ones within about k * 6e-8 of the sum of magnitudes, and exactly for integers.
`threads` is accepted and not used.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.kernels import blocks, lanes, super_blocks
from mpillm.kernels.checks import (
    require,
    require_activation,
    require_activations,
    require_cap,
    require_pools,
    require_rows,
    require_vector,
    require_weights,
    rotary_of,
)
from mpillm.kernels.recurrent import decays, delta_rule, short_conv
from mpillm.kernels.types import (
    BF16_BLOCK,
    F32,
    I32,
    KV_BLOCK,
    PAIRED,
    QUANT_BLOCK,
    TILE_ROWS,
    U8,
    Activation,
    BlockType,
    Bounds,
    activation_nbytes,
    check_bounds,
    check_whole,
    packed_nbytes,
    strided_nbytes,
)

Pool = npt.NDArray[Any]

LANES = 2**18  # floats that are summed at a time

__all__ = [
    "activate", "activation_nbytes", "attention", "decays", "delta_rule", "dequantize", "first_touch", "fold",
    "kv_store", "layer_norm", "lse_parts", "matmul", "pack", "packed_nbytes", "quantize", "quantize_rows", "rms_norm",
    "rope", "short_conv", "softcap", "softmax", "square_sums", "top_k",
]  # fmt: skip


def first_touch(memory: U8, threads: int = 1) -> None:
    """Write to each page of new memory, in turn by each thread; its values are then undefined.

    Memory lies on the NUMA node of the thread that touches it first.  NumPy has no threads: whoever fills it does.
    """


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
    """Canonical rows uint8 [n, row bytes] in kernel-ready form: rows `first`... of a matrix of `whole`.

    Rows of floats stay as they are, but that a panel's columns lie together; others are interleaved by 16. `stored` is
    their type if it is another one: floats, which are then quantised. With `head` > 0 they lie as llama.cpp stores q
    and k: row (head, half, j) of heads of so many rows at (head, j, half).
    """
    type, stored = BlockType(type), BlockType(type if stored is None else stored)
    edges = check_bounds(bounds, k, type.block)
    n, rows = len(canonical), first + len(canonical) if whole is None else whole
    if stored != type and (stored.quantised or type not in (BlockType.Q8_0, BlockType.Q4_0)):
        raise ValueError(f"pack makes Q8_0 or Q4_0 of F32, F16 or BF16, not block type {type} of {stored}")
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
        canonical = np.empty((n, type.row_bytes(k)), np.uint8)
        quantize(type, values, canonical)
    unit, begin = TILE_ROWS if type.quantised else 1, 0
    there, all_rows = (-(-count // unit) * unit for count in (n, rows))
    for panel in blocks.interleave(type, canonical, edges):
        row = panel.nbytes // max(there, 1)
        out[begin + first * row :][: panel.nbytes] = panel
        begin += all_rows * row


def quantize(type: BlockType, x: F32, out: U8, threads: int = 1) -> None:
    """x f32 [n, k] to canonical Q8_0 or Q4_0 rows, rounded as ggml's reference does."""
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
    """Canonical rows of any type to f32 [n, k]."""
    type = BlockType(type)
    require_rows("canonical", canonical, width=type.row_bytes(k))
    require_rows("out", out, rows=len(canonical), width=k, dtype=np.float32)
    if type.k_quant:
        check_whole(k)
    out[:] = blocks.decode(type, canonical, k)


def quantize_rows(x: F32, bounds: Bounds, out: U8, threads: int = 1) -> None:
    """Activations x f32 [m, k] to the blocks that `matmul` takes for quantised weights."""
    require_rows("x", x, dtype=np.float32)
    require("out", out, (len(x), activation_nbytes(x.shape[1], bounds)), np.uint8)
    out[:] = blocks.activations(x, bounds)


def matmul(type: BlockType, w: U8, n: int, k: int, bounds: Bounds, x: npt.NDArray[np.generic], out: F32,
           threads: int = 1, fold: bool = True, row_bytes: int = 0) -> None:  # fmt: skip
    """out [m, n] = x [m, k] @ W[n, k].T; with fold=False out [P, m, n] gets the panels' sums.

    `row_bytes`: rows of floats lie so far apart in w, as in a file; 0: w is packed.
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
        _quantised_panels(type, w, n, edges, x, sums)
    else:
        _unquantised_panels(type, w, n, edges, x, row_bytes, sums)
    out[...] = lanes.tree(sums) if fold else sums


def _quantised_panels(
    type: BlockType, w: U8, n: int, edges: npt.NDArray[np.int64], x: npt.NDArray[Any], sums: F32
) -> None:
    tiles, rows = -(-n // TILE_ROWS), blocks.ungrouped(x)
    start = column = 0
    for p, (begin, end) in enumerate(itertools.pairwise(edges)):
        count = int(-(-(end - begin) // type.block))
        nbytes = tiles * TILE_ROWS * count * type.packed_bytes
        panel = w[start : start + nbytes]
        product = _k_quants if type.k_quant else _quantised
        width = count * (type.block // QUANT_BLOCK)
        sums[p] = product(type, panel, tiles, count, rows[:, column : column + width])[:, :n]
        start, column = start + nbytes, column + width


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
    for p, (begin, end) in enumerate(itertools.pairwise(edges.tolist())):
        width = (end - begin) * type.block_bytes
        apart = row_bytes or width
        nbytes = strided_nbytes(type, n, end - begin, apart)
        panel = np.lib.stride_tricks.as_strided(
            w[start : start + nbytes], (n, width), (apart, 1), writeable=False
        )
        start += width if row_bytes else nbytes
        rows = blocks.rounded(x[:, begin:end]) if type == BlockType.BF16 else x[:, begin:end]
        sums[p] = _unquantised(type, panel, end - begin, rows)


def _quantised(type: BlockType, panel: U8, tiles: int, count: int, act: npt.NDArray[Any]) -> F32:
    """Panel sums [m, tiles * 16]: the integer dot products through float32 BLAS, exact in any order below 2**24."""
    w = panel.view(blocks.PACKED[type]).reshape(tiles, count)
    q = (
        w["q"].transpose(1, 0, 3, 2, 4).reshape(count, tiles * TILE_ROWS, w["q"].shape[2] * 4)
    )  # block, row, byte
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
    """As `_quantised`, part by part of 32 columns, whose halves may have scales of their own."""
    w = panel.view(blocks.PACKED[type]).reshape(tiles, count)
    acc = np.zeros((len(act), tiles * TILE_ROWS), np.float32)
    with np.errstate(all="ignore"):
        for b, s in itertools.product(range(count), range(super_blocks.PARTS)):
            part = act[:, b * super_blocks.PARTS + s]
            words = w["q"][:, b, s].transpose(0, 2, 1, 3).reshape(tiles * TILE_ROWS, -1, 4)  # row, word, byte
            small = w["scales"][:, b, s].swapaxes(1, 2).reshape(tiles * TILE_ROWS, -1)
            q, small_scale, least = super_blocks.meaning(
                type, super_blocks.integers_of_tile(type, words), np.ascontiguousarray(small)
            )
            d, scale = w["d"][:, b].reshape(-1).astype(np.float32), part["scale"][:, None]
            m = w["m"][:, b].reshape(-1).astype(np.float32) if least is not None else d
            values, wanted = q.astype(np.float32), part["q"].astype(np.float32)
            if type not in super_blocks.HALVED:
                acc = lanes.fma(wanted @ values.T, d * small_scale[:, 0] * scale, acc)
                if least is not None:
                    acc = lanes.fma(-(m * least[:, 0]), part["total"][:, None], acc)
                continue
            first, second = (wanted[:, h] @ values[:, h].T for h in (slice(16), slice(16, None)))
            acc = lanes.fma(first * small_scale[:, 0] + second * small_scale[:, 1], d * scale, acc)
            if least is not None:
                sums = part["less32"].astype(np.float32) @ least.T.astype(np.float32)
                acc = lanes.fma(sums, m / np.float32(32) * scale, acc)
    return acc


def _unquantised(type: BlockType, panel: U8, count: int, x: F32) -> F32:
    """Panel sums [m, n]: 16 lanes; with BF16 they begin anew for each block, whose sums go to 8 lanes."""
    paired = type == BlockType.BF16
    step = PAIRED if paired else TILE_ROWS
    steps = -(-count // step)
    w, rows = np.zeros((len(panel), steps * step), np.float32), np.zeros((len(x), steps * step), np.float32)
    w[:, :count], rows[:, :count] = blocks.decode(type, panel, count), x
    if paired:  # denormals count as zeros
        for a in (w, rows):
            a[np.abs(a) < np.finfo(np.float32).tiny] = 0
    # [step, half of a pair, row, lane]; lane j has column j, or columns 2 j + 1 and 2 j
    w, rows = (
        np.ascontiguousarray(
            a.reshape(len(a), steps, TILE_ROWS, step // TILE_ROWS)[..., ::-1].transpose(1, 3, 0, 2)
        )
        for a in (w, rows)
    )
    sums = np.empty((len(x), len(panel)), np.float32)
    few = max(
        LANES // (len(panel) * TILE_ROWS + 1), 1
    )  # rows of x at a time: their lanes should stay in a cache
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


def fold(parts: F32, out: F32, threads: int = 1) -> None:
    """out [m, d] = the tree sum ((p0 + p1) + (p2 + p3)) ... of parts [P, m, d], P a power of two."""
    count = len(parts)
    if parts.ndim != 3 or count < 1 or count & (count - 1) or count > 64:
        raise ValueError(f"parts must be [P, m, d] with P a power of two up to 64, not {parts.shape}")
    require("parts", parts, parts.shape, np.float32)
    require_rows("out", out, rows=parts.shape[1], width=parts.shape[2], dtype=np.float32)
    out[:] = lanes.tree(parts)


def square_sums(x: F32, out: F32, threads: int = 1) -> None:
    """out [m] = the sum of squares of each row of x [m, d]."""
    require_rows("x", x, dtype=np.float32)
    require("out", out, (len(x),), np.float32)
    out[:] = lanes.lane_sum(x, squares=True)


def rms_norm(x: F32, w: F32 | None, eps: float, out: F32, threads: int = 1, groups: int = 1) -> None:
    """out = w * x / sqrt(mean(x^2) + eps) of each row; w may be missing.

    The squares of each of `groups` equal parts of a row are summed apart, and the sums added in order: shards that have
    some of the parts each can exchange `square_sums`.
    """
    require_rows("x", x, dtype=np.float32)
    require_vector("w", w, x.shape[1])
    require_rows("out", out, rows=len(x), width=x.shape[1], dtype=np.float32)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} columns are not {groups} groups")
    with np.errstate(all="ignore"):
        parts = [lanes.lane_sum(part, squares=True) for part in np.split(x, groups, axis=1)]
        mean = functools.reduce(np.add, parts) / np.float32(x.shape[1])
        scaled = x * (np.float32(1) / np.sqrt(mean + np.float32(eps)))[:, None]
        out[:] = scaled if w is None else w * scaled


def layer_norm(x: F32, w: F32 | None, bias: F32 | None, eps: float, out: F32, threads: int = 1) -> None:
    """out = w * (x - mean) / sqrt(variance + eps) + bias of each row; w and bias may be missing."""
    require_rows("x", x, dtype=np.float32)
    require_vector("w", w, x.shape[1])
    require_vector("bias", bias, x.shape[1])
    require_rows("out", out, rows=len(x), width=x.shape[1], dtype=np.float32)
    with np.errstate(all="ignore"):
        width = np.float32(x.shape[1])
        centred = x - (lanes.lane_sum(x) / width)[:, None]
        variance = lanes.lane_sum(centred, squares=True) / width
        scaled = centred * (np.float32(1) / np.sqrt(variance + np.float32(eps)))[:, None]
        scaled = scaled if w is None else w * scaled
        out[:] = scaled if bias is None else scaled + bias


def rope(x: F32, cos: F32, sin: F32, heads: int, hd: int, threads: int = 1, rotary: int = 0,
         interleaved: bool = False) -> None:  # fmt: skip
    """Rotate x [m, heads * hd] in place by cos, sin [m, rotary / 2].

    The first `rotary` dimensions of each head are rotated (0: all), in pairs (i, i + rotary / 2), or (2i, 2i + 1) if
    they are interleaved.
    """
    require_rows("x", x, width=heads * hd, dtype=np.float32)
    half = rotary_of(rotary, hd) // 2
    require("cos", cos, (len(x), half), np.float32)
    require("sin", sin, (len(x), half), np.float32)
    for head in range(heads):
        rotated = x[:, head * hd : head * hd + 2 * half]
        first, second = (
            (rotated[:, part::2] if interleaved else rotated[:, part * half : (part + 1) * half])
            for part in (0, 1)
        )
        a, b = first.copy(), second.copy()
        with np.errstate(all="ignore"):
            first[:] = a * cos - b * sin
            second[:] = b * cos + a * sin


def activate(kind: Activation, gate: F32, up: F32 | None, out: F32, threads: int = 1, limit: float = 0.0,
             alpha: float = 1.702) -> None:  # fmt: skip
    """out = f(gate) * up, or f(gate); `limit` and `alpha` belong to SWIGLU_CLAMPED (see `Activation`)."""
    kind = require_activation(kind, up is not None, limit)
    require_rows("gate", gate, dtype=np.float32)
    if up is not None:
        require_rows("up", up, rows=len(gate), width=gate.shape[1], dtype=np.float32)
    require_rows("out", out, rows=len(gate), width=gate.shape[1], dtype=np.float32)
    with np.errstate(all="ignore"):
        f = _activated(kind, gate, np.float32(limit), np.float32(alpha))
        if up is None:
            out[:] = f
        elif kind == Activation.SWIGLU_CLAMPED:
            out[:] = f * (np.clip(up, np.float32(-limit), np.float32(limit)) + np.float32(1))
        else:
            out[:] = f * up


def _activated(kind: Activation, x: F32, limit: np.float32, alpha: np.float32) -> F32:
    result: F32
    match kind:
        case Activation.SILU:
            result = _sigmoid_times(x, x)
        case Activation.GELU:
            result = x * lanes.normal(x)
        case Activation.GELU_TANH:  # (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
            cube = x * x * x * np.float32(0.044715)
            result = _sigmoid_times((x + cube) * np.float32(1.5957691216057308), x)
        case Activation.RELU2:
            result = np.square(np.maximum(x, np.float32(0)))
        case Activation.SIGMOID:
            result = _sigmoid_times(x, np.float32(1))
        case Activation.SWIGLU_CLAMPED:
            x = np.minimum(x, limit)
            result = _sigmoid_times(alpha * x, x)
    return result


def _sigmoid_times(x: F32, factor: F32 | np.float32) -> F32:
    product: F32 = factor / (np.float32(1) + lanes.exp(-x))
    return product


def softcap(x: F32, cap: float, threads: int = 1) -> None:
    """x = cap * tanh(x / cap), in place."""
    require_rows("x", x, dtype=np.float32)
    require_cap(cap)
    with np.errstate(all="ignore"):
        x[:] = np.float32(cap) * lanes.tanh(x / np.float32(cap))


def softmax(x: F32, threads: int = 1) -> None:
    """Softmax of each row of x [m, d], in place."""
    require_rows("x", x, dtype=np.float32)
    with np.errstate(all="ignore"):
        e = lanes.exp(x - lanes.lane_max(x)[:, None])
        x[:] = e / lanes.lane_sum(e)[:, None]


def kv_store(kv_type: BlockType, k: F32, v: F32 | None, block: I32, offset: I32, kpool: Pool, vpool: Pool | None,
             kvh: int, hd: int, value_dim: int = 0) -> None:  # fmt: skip
    """Put k [m, kvh * hd] and v [m, kvh * value_dim] at (block[i], offset[i]) of the pools (see `types.kv_pools`).

    v and vpool may be None where values are a part of the keys (see `attention`).
    """
    value_dim = value_dim or hd
    require_rows("k", k, width=kvh * hd, dtype=np.float32)
    if (v is None) != (vpool is None):
        raise ValueError("v and vpool must both be given, or neither")
    if v is not None:
        require_rows("v", v, rows=len(k), width=kvh * value_dim, dtype=np.float32)
    require_pools(kv_type, kpool, vpool, kvh, hd, value_dim)
    for name, array, limit in (("block", block, len(kpool)), ("offset", offset, KV_BLOCK)):
        require(name, array, (len(k),), np.int32)
        if len(k) and not 0 <= array.min() <= array.max() < limit:
            raise ValueError(f"{name} must be within 0..{limit - 1}")
    stored = [(k.reshape(len(k), kvh, hd), kpool, True)]
    if v is not None and vpool is not None:
        stored.append((v.reshape(len(k), kvh, value_dim), vpool, False))
    for x, pool, is_keys in stored:
        dim = x.shape[2]
        if kv_type == BlockType.Q8_0:
            q, scales = _q8_parts(pool, dim, is_keys)
            done = np.empty((len(k) * kvh, kv_type.row_bytes(dim)), np.uint8)
            quantize(kv_type, np.ascontiguousarray(x).reshape(-1, dim), done)
            blocks = done.reshape(len(k), kvh, -1, kv_type.block_bytes)
            scales[block, :, :, offset] = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
            to, row = q, blocks[..., 2:].view(np.int8).reshape(len(k), kvh, dim)
        else:
            element = np.float32 if kv_type == BlockType.F32 else np.float16
            with np.errstate(over="ignore"):
                to, row = pool.view(element), x.astype(element)
        if is_keys:
            to[block, :, :, offset] = row
        else:
            to[block, :, offset, :] = row


def _q8_parts(pool: Pool, hd: int, is_keys: bool) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Views of a Q8_0 pool: integers, [block, head, dim, token] of keys and [.., token, dim] of values, and scales
    [block, head, dim / 32, token]."""
    heads = pool.shape[:2]
    q = pool[..., 2 * hd :].view(np.int8).reshape(*heads, *((hd, KV_BLOCK) if is_keys else (KV_BLOCK, hd)))
    scales = pool[..., : 2 * hd].view(np.float16).reshape(*heads, hd // QUANT_BLOCK, KV_BLOCK)
    return q, scales


def _kv_floats(kv_type: BlockType, pool: Pool, used: I32, hd: int, is_keys: bool) -> F32:
    """Blocks of a pool as f32 [block, head, dim, token], of values [.., token, dim]."""
    if kv_type != BlockType.Q8_0:
        found: F32 = pool.view(np.float32 if kv_type == BlockType.F32 else np.float16)[used].astype(
            np.float32
        )
        return found
    q, scales = _q8_parts(pool[used], hd, is_keys)
    by_dim = np.repeat(scales.astype(np.float32), QUANT_BLOCK, axis=2)
    product: F32 = q.astype(np.float32) * (by_dim if is_keys else by_dim.swapaxes(2, 3))
    return product


def attention(kv_type: BlockType, q: F32, out: F32, kpool: Pool, vpool: Pool | None, pos: I32,
              table: I32, table_start: I32, kv_of_head: I32, kvh: int, hd: int, scale: float, window: int,
              threads: int = 1, value_dim: int = 0, sinks: F32 | None = None,
              softcap: float = 0.0) -> None:  # fmt: skip
    """Row i attends to the last `window` (0: all) positions up to pos[i] of the sequence at table[table_start[i]].

    q [m, heads * hd], out [m, heads * value_dim] (0: hd). `sinks` [heads]: a logit that takes part in the softmax's
    denominator, and has no value (gpt-oss). `softcap` > 0: scores s become softcap * tanh(s / softcap) (Gemma 2).
    Without vpool a head's values are the first value_dim dimensions of its keys (the latents of DeepSeek V2).
    """
    heads, value_dim = len(kv_of_head), value_dim or hd
    require_rows("q", q, width=heads * hd, dtype=np.float32)
    require_rows("out", out, rows=len(q), width=heads * value_dim, dtype=np.float32)
    require_pools(kv_type, kpool, vpool, kvh, hd, value_dim)
    require_vector("sinks", sinks, heads)
    if softcap:
        require_cap(softcap)
    require("pos", pos, (len(q),), np.int32)
    require("table_start", table_start, (len(q),), np.int32)
    require("table", table, (len(table),), np.int32)
    require("kv_of_head", kv_of_head, (heads,), np.int32)
    if heads and not 0 <= kv_of_head.min() <= kv_of_head.max() < kvh:
        raise ValueError(f"kv_of_head must be within 0..{kvh - 1}")
    for i, (last, first) in enumerate(zip(pos.tolist(), table_start.tolist(), strict=True)):
        if last < 0 or first < 0 or first + last // KV_BLOCK >= len(table):
            raise ValueError(
                f"row {i}: position {last} lies outside its block table of {len(table) - first} blocks"
            )
        begin = max(0, last - window + 1) if window else 0
        used = table[first + begin // KV_BLOCK : first + last // KV_BLOCK + 1]
        if not 0 <= used.min() <= used.max() < len(kpool):
            raise ValueError(f"row {i}: the block table names a block outside the pool of {len(kpool)}")
        keys = _kv_floats(kv_type, kpool, used, hd, True).transpose(1, 2, 0, 3).reshape(kvh, hd, -1)
        if vpool is None:
            values = keys[:, :value_dim].swapaxes(1, 2)
        else:
            values = _kv_floats(kv_type, vpool, used, value_dim, False).transpose(1, 0, 2, 3)
            values = values.reshape(kvh, -1, value_dim)
        skip = begin % KV_BLOCK
        span = slice(skip, skip + last - begin + 1)
        for head, g in enumerate(kv_of_head.tolist()):
            mine = q[i, head * hd : (head + 1) * hd] * np.float32(scale)
            sink = np.float32(-np.inf) if sinks is None else sinks[head]
            out[i, head * value_dim : (head + 1) * value_dim] = _attend(
                mine, keys[g][:, span], values[g][span], sink, np.float32(softcap)
            )


def _attend(q: F32, keys: F32, values: F32, sink: np.float32, cap: np.float32) -> F32:
    """One head of one row: q [hd], scaled, keys [hd, t], values [t, value_dim]."""
    with np.errstate(all="ignore"):
        scores = np.add.reduce(q[:, None] * keys, axis=0)[None]
        if cap:
            scores = cap * lanes.tanh(scores / cap)
        top = np.maximum(lanes.lane_max(scores), sink)
        e = lanes.exp(scores - top[:, None])
        total = lanes.lane_sum(e)[0] + lanes.exp(sink - top)[0]
        mixed: F32 = np.add.reduce(e[0][:, None] * values, axis=0) / total
    return mixed


def top_k(x: F32, k: int, values: F32, ids: I32, threads: int = 1) -> None:
    """The k largest of each row of x [m, n], descending, lower id first among equals; beyond n: -inf and -1."""
    require_rows("x", x, dtype=np.float32)
    require("values", values, (len(x), k), np.float32)
    require("ids", ids, (len(x), k), np.int32)
    clean = np.where(np.isnan(x), np.float32(-np.inf), x)
    order = np.argsort(-clean, axis=1, kind="stable")[:, :k]
    values[:] = -np.inf
    ids[:] = -1
    ids[:, : order.shape[1]] = order
    values[:, : order.shape[1]] = np.take_along_axis(clean, order, 1)


def lse_parts(x: F32, inv_t: F32, bounds: I32, out: F32, threads: int = 1) -> None:
    """out [m, P, 3] = max, sum exp(x - max), sum exp((x - max) * inv_t) of x[:, bounds[p]:bounds[p + 1]]."""
    require_rows("x", x, dtype=np.float32)
    edges = np.asarray(bounds)
    if (
        edges.ndim != 1
        or len(edges) < 2
        or edges[0] < 0
        or edges[-1] > x.shape[1]
        or (np.diff(edges) < 0).any()
    ):
        raise ValueError(f"bounds must rise within 0..{x.shape[1]}: {edges.tolist()}")
    require("inv_t", inv_t, (len(x),), np.float32)
    require("out", out, (len(x), len(edges) - 1, 3), np.float32)
    with np.errstate(all="ignore"):
        for p, (begin, end) in enumerate(itertools.pairwise(edges)):
            part = x[:, begin:end]
            top = lanes.lane_max(part)
            shifted = part - np.where(np.isneginf(top), np.float32(0), top)[:, None]
            out[:, p, 0] = top
            out[:, p, 1] = lanes.lane_sum(lanes.exp(shifted))
            out[:, p, 2] = lanes.lane_sum(lanes.exp(shifted * inv_t[:, None]))
