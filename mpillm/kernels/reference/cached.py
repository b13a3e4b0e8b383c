"""The KV cache and attention over it; see `reference` for how results compare with the compiled kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.kernels import lanes
from mpillm.kernels.blocks import quantise_q8
from mpillm.kernels.checks import (
    require,
    require_cap,
    require_chunks,
    require_pools,
    require_rows,
    require_tuning,
    require_vector,
)
from mpillm.kernels.reference.products import quantize
from mpillm.kernels.types import (
    F32,
    I32,
    KV_BLOCK,
    QUANT_BLOCK,
    BlockType,
    KvType,
)

Pool = npt.NDArray[Any]


def kv_store(kv_type: KvType, k: F32, v: F32 | None, block: I32, offset: I32, kpool: Pool, vpool: Pool | None,
             kvh: int, hd: int, value_dim: int = 0) -> None:  # fmt: skip
    """Store row i of k [m, kvh * hd] and v [m, kvh * value_dim] at (block[i], offset[i]) of `types.kv_pools`.

    v and vpool are None if the values are a part of the keys (see `attention`).
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
        if kv_type.int8:
            q, scales = _q8_parts(pool, dim, is_keys)
            done = np.empty((len(k) * kvh, BlockType.Q8_0.row_bytes(dim)), np.uint8)
            quantize(BlockType.Q8_0, np.ascontiguousarray(x).reshape(-1, dim), done)
            blocks = done.reshape(len(k), kvh, -1, BlockType.Q8_0.block_bytes)
            scales[block, :, :, offset] = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
            to, row = q, blocks[..., 2:].view(np.int8).reshape(len(k), kvh, dim)
        else:
            element = np.float32 if kv_type == KvType.F32 else np.float16
            with np.errstate(over="ignore"):
                to, row = pool.view(element), x.astype(element)
        if is_keys and kv_type == KvType.Q8_0_INT8:
            fours = to.reshape(*to.shape[:2], -1, KV_BLOCK, 4)
            fours[block, :, :, offset] = row.reshape(len(k), kvh, -1, 4)
        elif is_keys:
            to[block, :, :, offset] = row
        else:
            to[block, :, offset, :] = row


def _q8_parts(pool: Pool, hd: int, is_keys: bool) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Return views of a Q8_0 pool: integers and scales.

    Integers are [block, head, dim, token] for keys and [block, head, token, dim] for values; scales are
    [block, head, dim / 32, token].
    """
    heads = pool.shape[:2]
    q = pool[..., 2 * hd :].view(np.int8).reshape(*heads, *((hd, KV_BLOCK) if is_keys else (KV_BLOCK, hd)))
    scales = pool[..., : 2 * hd].view(np.float16).reshape(*heads, hd // QUANT_BLOCK, KV_BLOCK)
    return q, scales


def _kv_floats(kv_type: KvType, pool: Pool, used: I32, hd: int, is_keys: bool) -> F32:
    """Return the blocks `used` of a pool as f32: keys [block, head, dim, token], values [block, head, token, dim]."""
    if not kv_type.int8:
        found: F32 = pool.view(np.float32 if kv_type == KvType.F32 else np.float16)[used].astype(np.float32)
        return found
    q, scales = _q8_parts(pool[used], hd, is_keys)
    if is_keys and kv_type == KvType.Q8_0_INT8:
        q = q.reshape(*q.shape[:2], -1, KV_BLOCK, 4).swapaxes(3, 4).reshape(q.shape)
    by_dim = np.repeat(scales.astype(np.float32), QUANT_BLOCK, axis=2)
    product: F32 = q.astype(np.float32) * (by_dim if is_keys else by_dim.swapaxes(2, 3))
    return product


def attention(kv_type: KvType, q: F32, out: F32, kpool: Pool, vpool: Pool | None, pos: I32,
              table: I32, table_start: I32, kv_of_head: I32, kvh: int, hd: int, scale: float, window: int,
              threads: int = 1, value_dim: int = 0, sinks: F32 | None = None,
              softcap: float = 0.0, chunked: bool = False,
              tuning: tuple[float, int, int] | None = None,
              bidirectional: bool = False) -> None:  # fmt: skip
    """Row i attends to the last `window` (0: all) positions up to pos[i] of the sequence at table[table_start[i]].

    q is [m, heads * hd], out is [m, heads * value_dim] (0: hd). `sinks` [heads] are logits that are added to the
    softmax's denominator and have no value (gpt-oss). `softcap` > 0 replaces scores s by softcap * tanh(s / softcap)
    (Gemma 2). With `chunked` a row attends to its own chunk of `window` positions (Llama 4). `tuning` (beta, length,
    offset) multiplies scores at position p by 1 + beta ln(1 + floor((p + offset) / length)) (Llama 4). With
    `bidirectional` a row attends to as many positions after its own as before it, up to the last row of its sequence,
    whose rows must be neighbours. If vpool is None, a head's values are the first value_dim dimensions of its keys (the
    latents of DeepSeek V2).
    """
    heads, value_dim = len(kv_of_head), value_dim or hd
    require_rows("q", q, width=heads * hd, dtype=np.float32)
    require_rows("out", out, rows=len(q), width=heads * value_dim, dtype=np.float32)
    require_pools(kv_type, kpool, vpool, kvh, hd, value_dim)
    require_vector("sinks", sinks, heads)
    if softcap:
        require_cap(softcap)
    require_chunks(window, chunked)
    require_tuning(tuning)
    require("pos", pos, (len(q),), np.int32)
    require("table_start", table_start, (len(q),), np.int32)
    require("table", table, (len(table),), np.int32)
    require("kv_of_head", kv_of_head, (heads,), np.int32)
    if heads and not 0 <= kv_of_head.min() <= kv_of_head.max() < kvh:
        raise ValueError(f"kv_of_head must be within 0..{kvh - 1}")
    ends = np.flatnonzero(np.diff(table_start, append=np.int32(-1)))  # the last row of each sequence
    for i, (at, first) in enumerate(zip(pos.tolist(), table_start.tolist(), strict=True)):
        if at < 0 or first < 0 or first + at // KV_BLOCK >= len(table):
            raise ValueError(
                f"row {i}: position {at} lies outside its block table of {len(table) - first} blocks"
            )
        begin, last = max(0, at - window + 1) if window else 0, at
        if chunked:
            begin = at - at % window
        if bidirectional:
            last = int(pos[ends[np.searchsorted(ends, i)]])
            last = min(last, at + window - 1) if window else last
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
            mine = q[i, head * hd : (head + 1) * hd] * (np.float32(scale) * np.float32(_tuned(tuning, at)))
            if kv_type == KvType.Q8_0_INT8:
                scales, integers = quantise_q8(mine.reshape(-1, QUANT_BLOCK))
                mine = (scales[:, None] * integers).astype(np.float32).reshape(-1)
            sink = np.float32(-np.inf) if sinks is None else sinks[head]
            out[i, head * value_dim : (head + 1) * value_dim] = _attend(
                mine, keys[g][:, span], values[g][span], sink, np.float32(softcap)
            )


def _tuned(tuning: tuple[float, int, int] | None, position: int) -> float:
    """Return the factor by which `tuning` multiplies the scores at a position, rounded to float32."""
    if tuning is None:
        return 1.0
    beta, length, offset = tuning
    return float(np.float32(1 + float(np.float32(beta)) * math.log(1 + (position + offset) // length)))


def _attend(q: F32, keys: F32, values: F32, sink: np.float32, cap: np.float32) -> F32:
    """Compute one head of one row, from q [hd], already scaled, keys [hd, t] and values [t, value_dim]."""
    with np.errstate(all="ignore"):
        scores = np.add.reduce(q[:, None] * keys, axis=0)[None]
        if cap:
            scores = cap * lanes.tanh(scores / cap)
        top = np.maximum(lanes.lane_max(scores), sink)
        e = lanes.exp(scores - top[:, None])
        total = lanes.lane_sum(e)[0] + lanes.exp(sink - top)[0]
        mixed: F32 = np.add.reduce(e[0][:, None] * values, axis=0) / total
    return mixed
