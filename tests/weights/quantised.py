"""Matrices as quantised checkpoints have them, written from the published layouts, with what they stand for.

Each function returns the tensors of a matrix by what follows its name, and its values f32 [n, k], exact or in the
float32 operations that the formats are read with.
"""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np

from mpillm.kernels.scaled_blocks import NF4

Array = np.ndarray[Any, Any]
Random = np.random.Generator
Written = tuple[dict[str, Array], Array]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ = [0, 2, 4, 6, 1, 3, 5, 7]  # the column of nibble k


def words(numbers: Array, bits: int, axis: int, order: list[int] | None = None) -> Array:
    """Unsigned numbers in int32 words along an axis; nibble k of a word is number order[k] of its own."""
    moved = np.moveaxis(numbers, axis, -1)
    if 32 % bits:  # a stream of bits, in which numbers cross words
        stream = (moved[..., None] >> np.arange(bits) & 1).reshape(*moved.shape[:-1], -1).astype(np.uint8)
        stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
        packed = np.packbits(stream, axis=-1, bitorder="little").view(np.int32)
        return np.ascontiguousarray(np.moveaxis(packed, -1, axis))
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % (32 // bits))])
    each = padded.reshape(*padded.shape[:-1], -1, 32 // bits).astype(np.uint32)
    out = np.zeros(each.shape[:-1], np.uint32)
    for k in range(32 // bits):
        out |= each[..., k if order is None else order[k]] << np.uint32(bits * k)
    return np.ascontiguousarray(np.moveaxis(out.view(np.int32), -1, axis))


def fp8(
    random: Random,
    n: int,
    k: int,
    block: tuple[int, int] | None = None,
    whole: bool = False,
    four: bool = False,
) -> Written:
    """e4m3 with scales for blocks (`four`: as ModelOpt stores them), for the whole tensor, or for each row."""
    values = (random.standard_normal((n, k)) * 60).astype(ml_dtypes.float8_e4m3fn)
    if block:
        shape = (-(-n // block[0]), -(-k // block[1]))
        scales = random.uniform(1e-4, 1e-3, shape).astype(np.float32)
        full = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:n, :k]
        named = {"weight_scale": scales[:, None, :, None]} if four else {"weight_scale_inv": scales}
        return {"weight": values} | named, values.astype(np.float32) * full
    scales = random.uniform(1e-4, 1e-3, () if whole else (n, 1)).astype(ml_dtypes.bfloat16)
    return {"weight": values, "weight_scale": scales}, values.astype(np.float32) * scales.astype(np.float32)


def gptq(
    random: Random,
    n: int,
    k: int,
    group: int,
    bits: int = 4,
    sym: bool = True,
    act: bool = False,
    plain: bool = False,
) -> Written:
    """Words down the columns, zeros less one, and perhaps groups in any order; `plain`: neither.

    One is taken from whole words where numbers do not cross them: a zero of 0 borrows from the next.
    """
    group = k if group < 0 else group
    count, top = k // group, 2**bits
    q = random.integers(0, top, (k, n))
    zeros = np.full((count, n), top // 2) if sym else random.integers(0, top, (count, n))
    scales = random.uniform(0.002, 0.02, (count, n)).astype(np.float16)
    index = (random.permutation(k) if act else np.arange(k)) // group
    w = scales.astype(np.float32)[index] * (q - zeros[index]).astype(np.float32)
    tensors = {"qweight": words(q, bits, 0), "qzeros": words(zeros, bits, 1), "scales": scales}
    if not plain:
        ones = words(np.ones_like(zeros), bits, 1).view(np.uint32)
        less = words((zeros - 1) % top, bits, 1) if 32 % bits else tensors["qzeros"].view(np.uint32) - ones
        tensors |= {"qzeros": less.view(np.int32), "g_idx": index.astype(np.int32)}
    return tensors, np.ascontiguousarray(w.T)


def awq(random: Random, n: int, k: int, group: int, sym: bool = False) -> Written:
    """Words along the rows of W, in an order of their own."""
    count = k // group
    q, zeros = random.integers(0, 16, (k, n)), random.integers(0, 16, (count, n))
    if sym:
        zeros[:] = 8
    scales = random.uniform(0.002, 0.02, (count, n)).astype(np.float16)
    w = np.repeat(scales.astype(np.float32), group, 0) * (q - np.repeat(zeros, group, 0)).astype(np.float32)
    tensors = {"qweight": words(q, 4, 1, AWQ), "qzeros": words(zeros, 4, 1, AWQ), "scales": scales}
    return tensors, np.ascontiguousarray(w.T)


def quark(
    random: Random,
    n: int,
    k: int,
    group: int,
    signed: bool = True,
    zero: bool = False,
    order: list[int] = AWQ,
) -> Written:
    """Words along the rows of W, of two's complements or not."""
    low = -8 if signed else 0
    q = random.integers(low, low + 16, (k, n))
    zeros = (
        random.integers(low, low + 16, (k // group, n))
        if zero or not signed
        else np.zeros((k // group, n), int)
    )
    scales = random.uniform(0.002, 0.02, (k // group, n)).astype(np.float16)
    w = np.repeat(scales.astype(np.float32), group, 0) * (q - np.repeat(zeros, group, 0)).astype(np.float32)
    tensors = {
        "weight": words(q & 15, 4, 1, order), "weight_zero_point": words(zeros & 15, 4, 1, order),
        "weight_scale": scales,
    }  # fmt: skip
    return tensors, np.ascontiguousarray(w.T)


def packed(
    random: Random,
    n: int,
    k: int,
    group: int,
    bits: int = 4,
    zero: bool = False,
    act: bool = False,
    apart: bool = False,
) -> Written:
    """compressed-tensors' integers in words; `apart`: zeros are not, as older releases wrote them."""
    group = k if group < 0 else group
    half = 2 ** (bits - 1)
    q = random.integers(-half, half, (n, k))
    zeros = random.integers(-half, half, (n, k // group)) if zero else np.zeros((n, k // group), int)
    scales = random.uniform(0.002, 0.02, (n, k // group)).astype(ml_dtypes.bfloat16)
    index = (random.permutation(k) if act else np.arange(k)) // group
    w = scales.astype(np.float32)[:, index] * (q - zeros[:, index]).astype(np.float32)
    tensors = {
        "weight_packed": words(q + half, bits, 1), "weight_scale": scales, "weight_shape": np.array([n, k]),
    }  # fmt: skip
    if zero:
        tensors["weight_zero_point"] = zeros.astype(np.int8) if apart else words(zeros + half, bits, 0)
    if act:
        tensors["weight_g_idx"] = index.astype(np.int32)
    return tensors, w


def packed_whole(random: Random, n: int, k: int, bits: int = 4) -> Written:
    """The same with one scale and one zero for all, which is not packed."""
    half = 2 ** (bits - 1)
    q, zero = random.integers(-half, half, (n, k)), np.array([3 - half], np.int8)
    scale = np.array([0.0078125], ml_dtypes.bfloat16)
    w = np.float32(scale[0]) * (q - zero).astype(np.float32)
    return {
        "weight_packed": words(q + half, bits, 1), "weight_scale": scale, "weight_zero_point": zero,
        "weight_shape": np.array([n, k]),
    }, w  # fmt: skip


def int8(random: Random, n: int, k: int, group: int = -1, zero: bool = False) -> Written:
    """compressed-tensors' W8A8: int8 with a scale, and perhaps a zero, for each group of columns."""
    group = k if group < 0 else group
    q = random.integers(-128, 128, (n, k)).astype(np.int8)
    scales = random.uniform(1e-4, 1e-3, (n, k // group)).astype(np.float32)
    tensors, whole = {"weight": q, "weight_scale": scales}, q.astype(np.float32)
    if zero:
        zeros = random.integers(-128, 128, scales.shape).astype(np.int8)
        tensors["weight_zero_point"] = zeros
        whole = whole - np.repeat(zeros.astype(np.float32), group, 1)
    return tensors, whole * np.repeat(scales, group, 1)


def mxfp8(random: Random, n: int, k: int, inverse: bool = False) -> Written:
    """e4m3 with exponents of 32 columns, under either name."""
    values = (random.standard_normal((n, k)) * 60).astype(ml_dtypes.float8_e4m3fn)
    exponents = random.integers(112, 118, (n, k // 32)).astype(np.uint8)
    w = values.astype(np.float32) * np.repeat(np.exp2(exponents.astype(np.float32) - 127), 32, 1)
    return {"weight": values, "weight_scale_inv" if inverse else "weight_scale": exponents}, w


def mxfp6(random: Random, n: int, k: int) -> Written:
    """compressed-tensors' MXFP6: e2m3, four in three bytes."""
    codes = random.integers(0, 64, (n, k))
    exponents = random.integers(118, 124, (n, k // 32)).astype(np.uint8)
    high, low = codes >> 3 & 3, codes & 7
    magnitude = np.where(high == 0, low / 8, (1 + low / 8) * np.exp2(high - 1.0)).astype(np.float32)
    w = np.where(codes >> 5, -magnitude, magnitude) * np.repeat(np.exp2(exponents - np.float32(127)), 32, 1)
    stream = (codes[..., None] >> np.arange(6) & 1).reshape(n, -1).astype(np.uint8)
    return {"weight_packed": np.packbits(stream, axis=-1, bitorder="little"), "weight_scale": exponents}, w


def nvfp4(random: Random, n: int, k: int, optimum: bool = False) -> Written:
    """e2m1 with e4m3 scales of 16 columns; one more number divides, or (`optimum`: ModelOpt) multiplies."""
    codes = random.integers(0, 16, (n, k)).astype(np.uint8)
    scales = random.uniform(1, 400, (n, k // 16)).astype(ml_dtypes.float8_e4m3fn)
    whole = np.float32(6000.0)
    values = codes[:, ::2] | codes[:, 1::2] << 4
    step = scales.astype(np.float32) * (np.float32(1) / whole if optimum else 1)
    w = E2M1[codes] * np.repeat(step if optimum else step / whole, 16, 1)
    if optimum:
        whole = np.array(np.float32(1) / whole)
        return {"weight": values, "weight_scale": scales, "weight_scale_2": whole}, w
    return {"weight_packed": values, "weight_scale": scales, "weight_global_scale": np.array([whole])}, w


def mxfp4(random: Random, n: int, k: int, name: str = "weight_packed") -> Written:
    """compressed-tensors' MXFP4, and Quark's."""
    codes = random.integers(0, 16, (n, k)).astype(np.uint8)
    exponents = random.integers(118, 124, (n, k // 32)).astype(np.uint8)
    w = E2M1[codes] * np.repeat(np.exp2(exponents.astype(np.float32) - 127), 32, 1)
    return {name: codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": exponents}, w


FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4 = np.concatenate([FP4, -FP4])


def nf4(
    random: Random,
    n: int,
    k: int,
    nested: bool,
    block: int = 64,
    table: Array = NF4,
    storage: Any = np.uint8,
) -> Written:
    """bitsandbytes' 4 bits: numbers of a table, the first of two in the upper half; scales of so many numbers.

    Their bytes are called numbers of `storage`.
    """
    codes = random.integers(0, 16, n * k).astype(np.uint8)
    count = n * k // block
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    tensors: dict[str, Array] = {"weight.quant_map": table}
    if nested:
        inner = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
        stored = random.integers(0, 256, count).astype(np.uint8)
        own = random.uniform(0.01, 0.02, -(-count // 256)).astype(np.float32)
        scales = inner[stored] * np.repeat(own, 256)[:count] + np.float32(0.05)
        tensors |= {"weight.absmax": stored, "weight.nested_absmax": own, "weight.nested_quant_map": inner}
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": float(np.float32(0.05)),
        }
    else:
        scales = tensors["weight.absmax"] = random.uniform(0.02, 0.1, count).astype(np.float32)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors |= {
        "weight": (codes[::2] << 4 | codes[1::2]).view(storage)[:, None], "weight.quant_state.bitsandbytes__nf4": text,
    }  # fmt: skip
    return tensors, (table[codes] * np.repeat(scales, block)).reshape(n, k)


def llm_int8(random: Random, n: int, k: int) -> Written:
    """bitsandbytes' int8: rows times SCB / 127."""
    q = random.integers(-127, 128, (n, k)).astype(np.int8)
    scb = random.uniform(0.05, 0.2, n).astype(np.float32)
    w = q.astype(np.float32) * (scb / np.float32(127))[:, None]
    return {"weight": q, "SCB": scb, "weight_format": np.array(0, np.uint8)}, w
