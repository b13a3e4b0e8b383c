"""Random calls of kernels as plain records: run here through `mpillm.kernels`, or elsewhere by harness.c."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpillm import kernels
from mpillm.kernels import Activation, BlockType, KvType
from mpillm.kernels.blocks import CANONICAL
from mpillm.kernels.scaled_blocks import BLOCKS

Array = np.ndarray[Any, Any]
KV_TYPES = tuple(KvType)
OPS = ("product", "quantize", "dequantize", "rms_norm", "rope", "activate", "softmax", "top_k", "lse_parts",
       "attention", "fold", "layer_norm", "square_sums", "softcap", "decays", "short_conv", "delta_rule",
       "selective_scan")  # fmt: skip


@dataclass
class Case:
    """One call: numbers and arrays in, arrays out."""

    op: str
    ints: list[int]
    arrays: list[Array]
    threads: int = 1
    label: str = field(default="")

    def __str__(self) -> str:
        return f"{self.op} {self.ints} {self.label}"

    def run(self) -> list[Array]:
        """Its outputs from the kernels' path in use; inputs stay as they are."""
        outputs: list[Array] = RUN[self.op](self.threads, *self.ints, *(a.copy() for a in self.arrays))
        return outputs

    def record(self) -> bytes:
        """What harness.c reads."""
        parts = [struct.pack(f"<ii{len(self.ints)}i", OPS.index(self.op), len(self.ints), *self.ints)]
        parts.append(struct.pack("<i", len(self.arrays)))
        for array in self.arrays:
            raw = np.ascontiguousarray(array).tobytes()
            parts.append(struct.pack("<q", len(raw)) + raw)
        return b"".join(parts)


def same(a: Array, b: Array) -> bool:
    """Equal bit for bit, but for the sign and payload of NaNs, which processors choose as they like."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == np.float32:
        a, b = (np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32) for x in (a, b))
    return np.array_equal(a, b)


# --- running -----------------------------------------------------------------------------------------------------


def _product(
    threads: int, type: int, n: int, k: int, m: int, fold: int, canonical: Array, bounds: Array, x: Array
) -> list[Array]:
    kind = BlockType(type)
    packed = np.full(kernels.packed_nbytes(kind, n, k, bounds), 0xAA, np.uint8)
    kernels.pack(kind, canonical, k, bounds, packed, threads)
    out = np.full((m, n) if fold else (len(bounds) - 1, m, n), np.nan, np.float32)
    if not kind.quantised:
        kernels.matmul(kind, packed, n, k, bounds, x, out, threads, bool(fold))
        return [packed, out]
    rows = np.full((m, kernels.activation_nbytes(k, bounds, kind)), 0xAA, np.uint8)
    kernels.quantize_rows(x, bounds, rows, threads, kind)
    kernels.matmul(kind, packed, n, k, bounds, rows, out, threads, bool(fold))
    return [packed, rows, out]


def _quantize(threads: int, type: int, n: int, k: int, x: Array) -> list[Array]:
    out = np.full((n, BlockType(type).row_bytes(k)), 0xAA, np.uint8)
    kernels.quantize(BlockType(type), x, out, threads)
    return [out]


def _dequantize(threads: int, type: int, n: int, k: int, canonical: Array) -> list[Array]:
    out = np.full((n, k), np.nan, np.float32)
    kernels.dequantize(BlockType(type), canonical, k, out, threads)
    return [out]


def _rms_norm(threads: int, m: int, d: int, groups: int, x: Array, w: Array, eps: Array) -> list[Array]:
    out = np.empty_like(x)
    kernels.rms_norm(x, w if len(w) else None, float(eps[0]), out, threads, groups)
    return [out]


def _layer_norm(threads: int, m: int, d: int, x: Array, w: Array, bias: Array, eps: Array) -> list[Array]:
    out = np.empty_like(x)
    kernels.layer_norm(x, w if len(w) else None, bias if len(bias) else None, float(eps[0]), out, threads)
    return [out]


def _square_sums(threads: int, m: int, d: int, x: Array) -> list[Array]:
    out = np.empty(m, np.float32)
    kernels.square_sums(x, out, threads)
    return [out]


def _rope(threads: int, m: int, heads: int, hd: int, rotary: int, interleaved: int, x: Array, cos: Array,
          sin: Array) -> list[Array]:  # fmt: skip
    kernels.rope(x, cos, sin, heads, hd, threads, rotary, bool(interleaved))
    return [x]


def _activate(threads: int, m: int, d: int, kind: int, gate: Array, up: Array, limit: Array) -> list[Array]:
    out = np.empty_like(gate)
    kernels.activate(
        Activation(kind), gate, up if len(up) else None, out, threads, float(limit[0]), float(limit[1])
    )
    return [out]


def _softcap(threads: int, m: int, d: int, x: Array, cap: Array) -> list[Array]:
    kernels.softcap(x, float(cap[0]), threads)
    return [x]


def _softmax(threads: int, m: int, d: int, x: Array) -> list[Array]:
    kernels.softmax(x, threads)
    return [x]


def _top_k(threads: int, m: int, n: int, k: int, x: Array) -> list[Array]:
    values, ids = np.empty((m, k), np.float32), np.empty((m, k), np.int32)
    kernels.top_k(x, k, values, ids, threads)
    return [values, ids]


def _lse_parts(
    threads: int, m: int, n: int, panels: int, x: Array, inv_t: Array, bounds: Array
) -> list[Array]:
    out = np.empty((m, panels, 3), np.float32)
    kernels.lse_parts(x, inv_t, bounds, out, threads)
    return [out]


def _attention(threads: int, kv_type: int, stored: int, rows: int, heads: int, kvh: int, hd: int, window: int,
               pool: int, vd: int, k: Array, v: Array, block: Array, offset: Array, q: Array, pos: Array, table: Array,
               table_start: Array, kv_of_head: Array, scale: Array, sinks: Array) -> list[Array]:  # fmt: skip
    kind = KvType(kv_type)
    kpool, vpool = (np.empty(shape, dtype) for shape, dtype in kernels.kv_pools(kind, pool, kvh, hd, vd))
    if shared := not v.size:
        vpool = vpool[:0]
    for one in (kpool, vpool):  # NaN: what was never stored must not be read
        one.view(np.float32 if kind == BlockType.F32 else np.uint16)[...] = (
            np.nan if kind == BlockType.F32 else 0x7E00
        )
    kernels.kv_store(
        kind, k, None if shared else v, block, offset, kpool, None if shared else vpool, kvh, hd, vd
    )
    out = np.empty((rows, heads * vd), np.float32)
    kernels.attention(kind, q, out, kpool, None if shared else vpool, pos, table, table_start, kv_of_head, kvh, hd,
                      float(scale[0]), abs(window), threads, vd, sinks if len(sinks) else None, float(scale[1]),
                      window < 0, (float(scale[2]), 7, 1) if scale[2] else None, bool(scale[3]))  # fmt: skip
    return [kpool, vpool, out]


def _fold(threads: int, panels: int, m: int, d: int, parts: Array) -> list[Array]:
    out = np.empty((m, d), np.float32)
    kernels.fold(parts, out, threads)
    return [out]


def _decays(
    threads: int, m: int, d: int, x: Array, rates: Array, bias: Array, of_steps: Array
) -> list[Array]:
    steps = np.empty_like(x)
    kernels.decays(x, rates, bias, threads, steps, *map(float, of_steps))
    return [steps, x]


def _short_conv(threads: int, m: int, channels: int, taps: int, silu: int, slots: int, x: Array, w: Array, bias: Array,
                tails: Array, first_rows: Array, slot: Array) -> list[Array]:  # fmt: skip
    out = np.empty_like(x)
    kernels.short_conv(x, w, bias if len(bias) else None, tails, first_rows, slot, out, bool(silu), threads)
    return [out, tails]


def _delta_rule(threads: int, m: int, keys: int, heads: int, dk: int, dv: int, slots: int, q: Array, k: Array, v: Array,
                decay: Array, beta: Array, states: Array, first_rows: Array, slot: Array,
                key_of_head: Array) -> list[Array]:  # fmt: skip
    out = np.empty_like(v)
    kernels.delta_rule(q, k, v, decay, beta, states, first_rows, slot, key_of_head, dk, dv, out, threads)
    return [out, states]


def _selective_scan(threads: int, m: int, groups: int, heads: int, dk: int, dv: int, slots: int, c: Array, b: Array,
                    x: Array, decay: Array, step: Array, skip: Array, states: Array, first_rows: Array, slot: Array,
                    group_of_head: Array) -> list[Array]:  # fmt: skip
    out = np.empty_like(x)
    kernels.selective_scan(
        c, b, x, decay, step, skip, states, first_rows, slot, group_of_head, dk, dv, out, threads
    )
    return [out, states]


RUN: dict[str, Any] = {op: globals()[f"_{op}"] for op in OPS}


# --- making ------------------------------------------------------------------------------------------------------


def values(rng: np.random.Generator, *shape: int) -> Array:
    """Normal values; of many rows some are zeros of both signs, tiny, denormal, huge or not finite."""
    x = rng.standard_normal(shape).astype(np.float32)
    if len(shape) == 2 and shape[0] >= 5:
        x[1] = np.where(rng.random(shape[1]) < 0.5, np.float32(0), np.float32(-0.0))
        x[2] *= np.float32(1e-40)
        x[3] *= np.float32(10.0) ** rng.integers(-30, 30, shape[1]).astype(np.float32)
        x[4, rng.integers(shape[1])] = rng.choice([np.nan, np.inf, -np.inf])
    return x


SCALES_AT = {  # of a block of 256 values
    BlockType.Q6_K: (208,),
    **dict.fromkeys((type for type in BlockType if type.k_quant and type.name.startswith("IQ")), (0,)),
    BlockType.Q3_K: (108,),
    BlockType.Q2_K: (80, 82),
}


def canonical(rng: np.random.Generator, type: BlockType, n: int, k: int) -> Array:
    """Rows of any type with all kinds of bits, scales of about 1."""
    if type.scaled:
        blocks = np.empty((n, -(-k // type.block)), BLOCKS[type])
        for name in blocks.dtype.names:
            blocks[name] = rng.integers(0, 256, blocks[name].shape)
        blocks["d"] = rng.standard_normal(blocks["d"].shape)
        if n >= 5:
            blocks["d"][1:5, 0] = 0, 1e-40, 1e30, rng.choice([np.nan, np.inf])
        return blocks.view(np.uint8)
    if not type.quantised:
        x = values(rng, n, k)
        if type == BlockType.F32:
            return x.view(np.uint8)
        if type.coded:
            return coded(rng, x)
        if type == BlockType.BF16:
            return np.ascontiguousarray((x.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8)
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint8)
    blocks = -(-k // type.block)
    if type.whole:  # a row's blocks have the same scale
        made = np.empty((n, blocks), CANONICAL[type])
        made["q"] = rng.integers(0, 256, made["q"].shape)
        made["d"] = rng.standard_normal((n, 1))
        if n >= 5:
            made["d"][1:5] = np.array([[0], [1e-40], [1e30], [rng.choice([np.nan, np.inf])]])
        return made.view(np.uint8)
    raw = rng.integers(0, 256, (n, blocks, type.block_bytes), dtype=np.uint8)
    if type.k_quant:
        for at in SCALES_AT.get(type, (0, 2)):
            scale = rng.standard_normal((n, blocks, 1)) / 100
            raw[:, :, at : at + 2] = scale.astype(np.float16).view(np.uint8)
        return raw.reshape(n, -1)
    if type == BlockType.MXFP4:
        raw[:, :, 0] = rng.choice(
            [0, 1, 2, 255, *range(118, 134)], (n, blocks), p=[0.005] * 4 + [0.98 / 16] * 16
        )
        return raw.reshape(n, -1)
    scales = 2 if type in (BlockType.Q4_1, BlockType.Q5_1) else 1
    raw[:, :, : 2 * scales] = rng.standard_normal((n, blocks, scales)).astype(np.float16).view(np.uint8)
    if k % 32 and type in (
        BlockType.Q8_0,
        BlockType.Q4_0,
        BlockType.Q4_1,
    ):  # the last block is padded with zeros
        quants = raw[:, -1, 2 * scales :]
        if type == BlockType.Q8_0:
            quants[:, k % 32 :] = 0
        else:
            zero = 8 if type == BlockType.Q4_0 else 0
            for j in range(k % 32, 32):
                shift = 4 * (j // 16)
                quants[:, j % 16] = (quants[:, j % 16] & (0xF0 >> shift)) | zero << shift
    return raw.reshape(n, -1)


def coded(rng: np.random.Generator, x: Array) -> Array:
    """Rows of BF16 of at most 15 high bytes, and few that are of any other, wherever tiles and blocks begin."""
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    common = np.array([*range(0x3A, 0x41), *range(0xBA, 0xC1), rng.choice([0, 0x80, 0x45])], np.uint16)
    few = rng.random(bits.shape) < 0.0005
    return np.ascontiguousarray(np.where(few, bits, bits & 0xFF | rng.choice(common, bits.shape) << 8)).view(
        np.uint8
    )


def whole(type: BlockType, k: int) -> int:
    """So many columns, or as many more as K-quants need."""
    return -(-k // type.block) * type.block if type.k_quant else k


def panels(rng: np.random.Generator, type: BlockType, k: int) -> Array:
    """1, 2, 4 or 8 panels of k columns, some perhaps empty."""
    inner = int(rng.choice([0, 1, 3, 7]))
    unit = type.block
    cuts = np.sort(rng.integers(0, -(-k // unit), inner)) * unit
    return np.array([0, *cuts, k], np.int32)


def product(
    rng: np.random.Generator, type: BlockType, n: int, k: int, m: int, threads: int = 1, fold: int = 1
) -> Case:
    """A product of random shapes' data; K-quants get whole blocks."""
    k = whole(type, k)
    arrays = [canonical(rng, type, n, k), panels(rng, type, k), values(rng, m, k)]
    return Case("product", [int(type), n, k, m, fold], arrays, threads, type.name)


def attention(rng: np.random.Generator, kv_type: KvType, hd: int, heads: int, kvh: int, window: int, rows: int = 9,
              threads: int = 1, vd: int = 0, sinks: bool = False, softcap: float = 0.0,
              shared: bool = False, tuning: float = 0.0, bidirectional: bool = False,
              spread: float = 3.0) -> Case:  # fmt: skip
    """Several sequences with scattered blocks; a few rows of each at random positions.

    `shared`: values are the first vd dimensions of keys. A window below 0 stands for chunks of so many positions.
    `spread`: the standard deviation of scores.
    """
    vd = vd or hd
    lengths = rng.integers(1, 150, 3)
    blocks = rng.permutation(40).astype(np.int32)
    start = np.concatenate([[0], np.cumsum(-(-lengths // 32))])
    where = [(blocks[start[s] + t // 32], t % 32) for s, length in enumerate(lengths) for t in range(length)]
    block, offset = (np.array(column, np.int32) for column in zip(*where, strict=True))
    owner = np.sort(rng.integers(0, 3, rows))
    pos = np.array([rng.integers(lengths[s]) for s in owner], np.int32)
    if bidirectional:  # rows attend up to the last one of their sequence
        pos = pos[np.lexsort((pos, owner))]
    kv_of_head = np.sort(rng.integers(0, kvh, heads)).astype(np.int32)
    stored = len(where)
    k, v = (rng.standard_normal((stored, kvh * dim)).astype(np.float32) for dim in (hd, vd))
    if shared:
        v = v[:0]
    q = np.float32(spread) * rng.standard_normal((rows, heads * hd)).astype(np.float32)
    ints = [int(kv_type), stored, rows, heads, kvh, hd, window, 40, vd]
    sink = 3 * rng.standard_normal(heads if sinks else 0).astype(np.float32)
    arrays = [k, v, block, offset, q, pos, blocks, start[owner].astype(np.int32), kv_of_head,
              np.array([hd**-0.5, softcap, tuning, bidirectional], np.float32), sink]  # fmt: skip
    return Case("attention", ints, arrays, threads, f"lengths {lengths.tolist()}")


def small(rng: np.random.Generator, m: int, d: int, threads: int = 1) -> Iterator[Case]:
    """Every operation on rows, for m rows of d values."""
    x = values(rng, m, d)
    eps, none = np.array([1e-5], np.float32), np.empty(0, np.float32)
    for groups in {1, next(n for n in (3, 2, 1) if d % n == 0)}:
        for w in (values(rng, d), none):
            yield Case("rms_norm", [m, d, groups], [x, w, eps], threads)
    yield Case("layer_norm", [m, d], [x + np.float32(3), values(rng, d), values(rng, d), eps], threads)
    yield Case("layer_norm", [m, d], [x, values(rng, d), none, eps], threads)
    yield Case("layer_norm", [m, d], [x, none, none, eps], threads)
    yield Case("square_sums", [m, d], [x], threads)
    for kind in Activation:
        parameters = np.array([7, 1.702], np.float32)
        yield Case("activate", [m, d, int(kind)], [8 * x, values(rng, m, d) * 8, parameters], threads)
        if kind != Activation.SWIGLU_CLAMPED:
            yield Case(
                "activate", [m, d, int(kind)], [8 * x, np.empty((0, d), np.float32), parameters], threads
            )
    yield Case("softcap", [m, d], [20 * x, np.array([30], np.float32)], threads)
    yield Case("softmax", [m, d], [5 * x], threads)
    for k in (1, 7, d + 3):
        coarse = np.where(np.abs(x) < 5, np.round(x * 4), x).astype(np.float32)  # ties
        yield Case("top_k", [m, d, k], [coarse], threads)
    cuts = np.sort(rng.integers(0, d + 1, 4)).astype(np.int32)
    yield Case("lse_parts", [m, d, 3], [9 * x, rng.random(m).astype(np.float32) * 3, cuts], threads)
    parts = int(rng.choice([1, 2, 4, 8]))
    yield Case("fold", [parts, m, d], [rng.standard_normal((parts, m, d)).astype(np.float32)], threads)
    for type in (BlockType.Q8_0, BlockType.Q4_0):
        yield Case("quantize", [int(type), m, d], [x], threads)
    for type in BlockType:
        yield Case(
            "dequantize", [int(type), m, whole(type, d)], [canonical(rng, type, m, whole(type, d))], threads
        )
    hd = 2 * (d // 2 + 1)
    for rotary, interleaved in ((hd, 0), (hd, 1), (max(hd // 4 * 2, 2), 0), (max(hd // 3 // 2 * 2, 2), 1)):
        angles = rng.standard_normal((m, rotary // 2)).astype(np.float32)
        arrays = [values(rng, m, 3 * hd), np.cos(angles), np.sin(angles)]
        yield Case("rope", [m, 3, hd, rotary, interleaved], arrays, threads)


def sequences(rng: np.random.Generator, m: int, slots: int) -> tuple[Array, Array]:
    """The first rows of up to so many sequences that have m rows together, and their slots."""
    count = int(rng.integers(1, min(m, slots) + 1))
    first = np.concatenate([[0], 1 + np.sort(rng.permutation(m - 1)[: count - 1])])
    return first.astype(np.int32), rng.permutation(slots)[:count].astype(np.int32)


def short_conv(
    rng: np.random.Generator, m: int, channels: int, taps: int, threads: int = 1, slots: int = 5
) -> Case:
    """Several sequences, each with rows before these."""
    first, slot = sequences(rng, m, slots)
    x, w, tails = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((m, channels), (taps, channels), (slots, max(taps - 1, 1) * channels))
    )
    bias = rng.standard_normal(channels if rng.integers(2) else 0).astype(np.float32)
    ints = [m, channels, taps, int(rng.integers(2)), slots]
    return Case("short_conv", ints, [x, w, bias, tails, first, slot], threads)


def head_states(rng: np.random.Generator, slots: int, heads: int, dk: int, dv: int) -> Array:
    """States of heads; what lies beyond the last column is zero."""
    states = rng.standard_normal((slots, kernels.delta_floats(heads, dk, dv))).astype(np.float32)
    states.reshape(slots, heads, -(-dv // 16), dk, 16)[:, :, -1, :, (dv - 1) % 16 + 1 :] = 0
    return states


def selective_scan(rng: np.random.Generator, m: int, groups: int, heads: int, dk: int, dv: int, threads: int = 1,
                   slots: int = 4) -> Case:  # fmt: skip
    """Several sequences, each with a state from before."""
    first, slot = sequences(rng, m, slots)
    c, b = rng.standard_normal((2, m, groups * dk)).astype(np.float32) / np.float32(dk**0.5)
    x = rng.standard_normal((m, heads * dv)).astype(np.float32)
    decay, step = rng.random((2, m, heads)).astype(np.float32)
    skip, group_of_head = rng.standard_normal(heads).astype(np.float32), rng.integers(0, groups, heads)
    states = head_states(rng, slots, heads, dk, dv)
    arrays = [c, b, x, decay, step, skip, states, first, slot, group_of_head.astype(np.int32)]
    return Case("selective_scan", [m, groups, heads, dk, dv, slots], arrays, threads)


def delta_rule(rng: np.random.Generator, m: int, keys: int, heads: int, dk: int, dv: int, threads: int = 1,
               slots: int = 4) -> Case:  # fmt: skip
    """Several sequences, each with a state from before; keys of about unit length."""
    first, slot = sequences(rng, m, slots)
    q, k = rng.standard_normal((2, m, keys * dk)).astype(np.float32) / np.float32(dk**0.5)
    v = rng.standard_normal((m, heads * dv)).astype(np.float32)
    decay, beta = rng.random((2, m, heads)).astype(np.float32)
    states = head_states(rng, slots, heads, dk, dv)
    key_of_head = rng.integers(0, keys, heads).astype(np.int32)
    arrays = [q, k, v, decay, beta, states, first, slot, key_of_head]
    return Case("delta_rule", [m, keys, heads, dk, dv, slots], arrays, threads)


def everything(rng: np.random.Generator, threads: int = 1) -> Iterator[Case]:
    """A mixture that touches every kernel, every type, tails of n, k, m and head dimensions."""
    for type in BlockType:
        for n, k, m in ((1, 33, 1), (16, 64, 2), (37, 257, 5), (70, 96, 1), (50, 100, 17), (33, 288, 33)):
            yield product(rng, type, n, k, m, threads, fold=int(rng.integers(2)))
        yield product(rng, type, 5, 1, 3, threads)
    wide = np.round(rng.standard_normal((2, 5003)) * 50).astype(np.float32)  # with ties, -0 among them
    wide[1, rng.integers(0, 5003, 700)] = [np.nan, -np.inf, np.inf, -1e30, 1e-42] * 140
    for count in (100, 300, 2000):
        yield Case("top_k", [2, 5003, count], [wide], threads)
    for m, d in ((1, 1), (3, 16), (6, 45), (7, 130), (5, 576)):
        yield from small(rng, m, d, threads)
    for m, d in ((1, 1), (4, 30), (9, 64)):
        x, rates, bias = values(rng, m, d) * 9, -np.exp(rng.standard_normal(d)), rng.standard_normal(d)
        for of_steps in ((1.0, 0.0, np.inf), (0.7, 0.02, 4.0)):
            vectors = [np.array(values, np.float32) for values in (rates, bias, of_steps)]
            yield Case("decays", [m, d], [x, *vectors], threads)
    for m, channels, taps in ((1, 1, 4), (2, 40, 4), (9, 67, 3), (30, 128, 5), (3, 16, 1)):
        yield short_conv(rng, m, channels, taps, threads)
    for m, keys, heads, dk, dv in ((1, 1, 1, 1, 1), (2, 2, 4, 6, 10), (7, 3, 6, 9, 18), (40, 2, 4, 64, 64)):
        yield delta_rule(rng, m, keys, heads, dk, dv, threads)
        yield selective_scan(rng, m, keys, heads, dk, dv, threads)
    for hd in (8, 16, 24, 64, 80, 96, 128):
        kv_type = KV_TYPES[int(rng.integers(2 if hd % 32 else 4))]
        yield attention(
            rng, kv_type, hd, heads=6, kvh=2, window=int(rng.choice([0, 0, 20, 64])), threads=threads
        )
    yield attention(rng, KV_TYPES[0], 2016, heads=7, kvh=1, window=0, rows=2, threads=threads)
    for kv_type in KV_TYPES:  # groups of one tile and of several, and heads too wide for that
        yield attention(
            rng, kv_type, 64, heads=9, kvh=3, window=int(rng.choice([0, 50])), rows=40, threads=threads
        )
        yield attention(rng, kv_type, 320, heads=3, kvh=1, window=0, rows=12, threads=threads)
        yield attention(rng, kv_type, 32, heads=8, kvh=1, window=0, rows=2, threads=threads, spread=50)
        for hd, vd, rows in ((64, 32, 3), (96, 128, 30), (288, 64, 7)):
            yield attention(
                rng, kv_type, hd, heads=6, kvh=2, window=int(rng.choice([0, 30])), rows=rows, threads=threads, vd=vd,
                sinks=bool(rng.integers(2)), softcap=float(rng.choice([0, 5])),
            )  # fmt: skip
        for hd, vd, heads in ((96, 64, 3), (576, 512, 30), (160, 32, 7)):
            yield attention(
                rng, kv_type, hd, heads, kvh=1, window=0, rows=5, threads=threads, vd=vd, shared=True
            )
        yield attention(rng, kv_type, 32, heads=4, kvh=2, window=20, rows=9, threads=threads, sinks=True)
        yield attention(rng, kv_type, 32, heads=4, kvh=2, window=-27, rows=20, threads=threads, tuning=0.3)
        yield attention(rng, kv_type, 32, heads=4, kvh=2, window=0, rows=9, threads=threads, softcap=2.5)
        for window, rows in ((0, 40), (20, 9), (50, 31)):
            yield attention(
                rng,
                kv_type,
                32,
                heads=4,
                kvh=4,
                window=window,
                rows=rows,
                threads=threads,
                bidirectional=True,
            )
