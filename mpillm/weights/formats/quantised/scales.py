"""Numbers of quantised checkpoints, and blocks of our own types made of integers and their scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mpillm.kernels.scaled_blocks import BLOCKS
from mpillm.kernels.types import QUANT_BLOCK, BlockType
from mpillm.weights.formats.extent import Rows
from mpillm.weights.formats.recipes import Raw
from mpillm.weights.formats.stored import OWN, Bytes, Floats, Stored

Ints = NDArray[np.integer[Any]]
FLOATS = ("F16", "BF16", "F32")
_DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I32": np.int32,
    "I64": np.int64,
    "I8": np.int8,
    "U8": np.uint8,
}


def stored_as(name: str, type: BlockType) -> Stored:
    """Blocks of one of our types that are made of what is called `name`."""
    return replace(OWN[type.name], name=name)


def array_of(raw: Raw) -> NDArray[Any]:
    """Return a small tensor, in its own type."""
    flat: NDArray[Any] = raw.file.view(raw.offset, raw.nbytes).copy().view(_DTYPES[raw.dtype])
    return flat.reshape(raw.shape)


def floats_of(raw: Raw) -> Floats:
    """Return a small tensor as float32."""
    return array_of(raw).astype(np.float32)


def indices(rows: Rows) -> NDArray[np.integer[Any]]:
    """Return rows as an array."""
    return np.arange(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows


def unpacked(words: Ints, bits: int) -> NDArray[np.uint8]:
    """Return the numbers in 32-bit words [..., w], lowest bits first: [..., w * 32 / bits]; 3-bit ones cross words."""
    plain = words.view(np.uint32)
    if 32 % bits == 0:
        values = plain[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
        numbers: NDArray[np.uint8] = values.astype(np.uint8).reshape(*words.shape[:-1], -1)
        return numbers
    word, shift = np.divmod(np.arange(0, 32 * words.shape[-1], bits), 32)
    after = np.append(plain[..., 1:], np.zeros_like(plain[..., :1]), axis=-1)
    pairs = plain.astype(np.uint64) | after.astype(np.uint64) << np.uint64(32)
    numbers = (pairs[..., word] >> shift.astype(np.uint64) & np.uint64(2**bits - 1)).astype(np.uint8)
    return numbers


def to_f16(values: Floats) -> Bytes:
    """Return rows of F16."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8)


def to_q8_0(q: NDArray[np.int8], scales: Floats) -> Bytes:
    """Q8_0 of integers [n, k] and scales [n, k / 32] or [n, 1]."""
    out = np.empty((len(q), q.shape[1] // QUANT_BLOCK, 34), np.uint8)
    out[..., :2] = _halves(scales, out.shape[1])
    out[..., 2:] = q.view(np.uint8).reshape(*out.shape[:2], QUANT_BLOCK)
    return out.reshape(len(q), -1)


def to_q4(q: NDArray[np.uint8], scales: Floats, zeros: Floats | None = None) -> Bytes:
    """Q4_0 of integers [n, k] whose zero is 8, or with `zeros` Q4_1; scales and zeros are [n, k / 32] or [n, 1]."""
    blocks = q.reshape(len(q), -1, 2, QUANT_BLOCK // 2)
    parts = [_halves(scales, blocks.shape[1])]
    if zeros is not None:
        parts.append(_halves(-(zeros * scales), blocks.shape[1]))
    return np.concatenate([*parts, blocks[:, :, 0] | blocks[:, :, 1] << 4], axis=-1).reshape(len(q), -1)


def to_5_bits(q: NDArray[np.uint8], scales: Floats, zeros: Floats | None = None) -> Bytes:
    """Q5_0 of integers [n, k] whose zero is 16, or with `zeros` Q5_1; scales and zeros are [n, k / 32]."""
    blocks = q.reshape(len(q), -1, QUANT_BLOCK)
    parts = [_halves(scales, blocks.shape[1])]
    if zeros is not None:
        parts.append(_halves(-(zeros * scales), blocks.shape[1]))
    parts.append(np.packbits(blocks >> 4, axis=-1, bitorder="little"))
    first, second = np.split(blocks & np.uint8(15), 2, axis=-1)
    parts.append(first | second << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(len(q), -1)


def scaled(type: BlockType, units: Floats, **fields: Bytes) -> Bytes:
    """Blocks of FP8, NVFP4 or NF4 of their fields [n, .], which are filled up to whole blocks.

    `units` [n, blocks] or [n, 1] multiply the blocks. A block of FP8 in which a number is NaN gets such a scale, and so
    does one of NVFP4 with such a scale within.
    """
    n, dtype = len(units), BLOCKS[type]
    each = {name: dtype[name].shape[0] for name in fields}
    count = max(-(-values.shape[1] // each[name]) for name, values in fields.items())
    out = np.empty((n, count), dtype)
    out["d"] = units
    for name, values in fields.items():
        whole, rest = divmod(values.shape[1], each[name])
        out[name][:, :whole] = values[:, : values.shape[1] - rest].reshape(n, whole, each[name])
        if rest:
            out[name][:, whole, :rest] = values[:, -rest:]
            out[name][:, whole, rest:] = 0
    numbers = "q" if type is BlockType.FP8 else "scales"
    if numbers in fields and ((fields[numbers] & 127) == 127).any():
        out["d"][((out[numbers] & 127) == 127).any(axis=-1)] = np.nan
    return out.view(np.uint8)


def _halves(values: Floats, count: int) -> Bytes:
    """F16 numbers as bytes [n, count, 2]."""
    with np.errstate(over="ignore", invalid="ignore"):
        halves = np.broadcast_to(values.astype(np.float16), (len(values), count))
    return np.ascontiguousarray(halves).view(np.uint8).reshape(len(values), count, 2)
