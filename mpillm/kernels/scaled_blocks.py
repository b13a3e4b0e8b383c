"""Blocks of a scale and codes that stand for floats: FP8, NVFP4 and NF4 (core/body_scaled.h)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mpillm.kernels.types import F32, U8, BlockType

# The value of each code. For e4m3 numbers (FP8, and the scales within NVFP4) the table has 2^-8 of the value, the F16
# number with the same bits; `units` has the factor 2^8. The codes of NaN stand for 480; a block with NaN has scale NaN.
_CODES = np.arange(256, dtype=np.uint16)
E4M3 = ((_CODES & 0x80) << 8 | (_CODES & 0x7F) << 7).view(np.float16).astype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
PART = 16  # columns that share a scale within a block of NVFP4

BLOCKS = {
    BlockType.FP8: np.dtype([("d", "<f4"), ("q", "u1", 128)]),
    BlockType.NVFP4: np.dtype([("d", "<f4"), ("scales", "u1", 8), ("q", "u1", 64)]),
    BlockType.NF4: np.dtype([("d", "<f4"), ("q", "u1", 32)]),
}


def pack_nibbles(codes: U8) -> U8:
    """Pack codes [..., k] of 4 bits as bytes [..., k / 2]: 16 bytes have 16 columns low and the next 16 high."""
    halves = codes.reshape(*codes.shape[:-1], -1, 2, PART)
    packed = halves[..., 0, :] | halves[..., 1, :] << 4
    return packed.astype(np.uint8, copy=False).reshape(*codes.shape[:-1], -1)


def numbers(type: BlockType, blocks: npt.NDArray[np.void]) -> F32:
    """Return the values of blocks before scaling by `units`: f32 [..., values of a block]."""
    q: U8 = blocks["q"]
    if type is BlockType.FP8:
        found: F32 = E4M3[q]
        return found
    nibbles = q.reshape(*q.shape[:-1], q.shape[-1] // PART, 1, PART)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-2).reshape(*q.shape[:-1], 2 * q.shape[-1])
    found = (NF4 if type is BlockType.NF4 else E2M1)[codes]
    return found * np.repeat(E4M3[blocks["scales"]], PART, axis=-1) if type is BlockType.NVFP4 else found


def units(type: BlockType, blocks: npt.NDArray[np.void]) -> F32:
    """Return the factor of each block."""
    factors: F32 = blocks["d"] if type is BlockType.NF4 else blocks["d"] * np.float32(256)
    return factors
