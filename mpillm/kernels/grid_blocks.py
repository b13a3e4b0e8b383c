"""IQ2 and IQ3 in NumPy: an index into a table gives the magnitudes of 8 (IQ3: 4) columns; signs are apart (grids.h)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpillm.kernels.types import QUANT_BLOCK, SUPER_BLOCK, U8, BlockType

PARTS = SUPER_BLOCK // QUANT_BLOCK

CANONICAL = {
    BlockType.IQ3_S: np.dtype(
        [("d", "<f2"), ("q", "u1", 64), ("high", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)]
    ),
    BlockType.IQ3_XXS: np.dtype([("d", "<f2"), ("q", "u1", 64), ("signs", "u1", 32)]),
    BlockType.IQ2_S: np.dtype(
        [("d", "<f2"), ("q", "u1", 32), ("signs", "u1", 32), ("high", "u1", 8), ("scales", "u1", 8)]
    ),
    BlockType.IQ2_XS: np.dtype([("d", "<f2"), ("q", "u1", 64), ("scales", "u1", 8)]),
    BlockType.IQ2_XXS: np.dtype([("d", "<f2"), ("q", "u1", 64)]),
}


class Grid(NamedTuple):
    """Bytes of a part in a tile, whether its scales are stored apart from it, and the factor of the block's scale."""

    bytes: int
    scales: bool
    unit: float


GRIDS = {
    BlockType.IQ3_S: Grid(13, True, 1.0),
    BlockType.IQ3_XXS: Grid(12, False, 0.25),
    BlockType.IQ2_S: Grid(9, True, 0.125),
    BlockType.IQ2_XS: Grid(8, True, 0.125),
    BlockType.IQ2_XXS: Grid(8, False, 0.125),
}


def parts_of(blocks: npt.NDArray[np.void]) -> U8:
    """Return the parts of canonical blocks as tiles store them: indices, signs, high bits, uint8 [..., 8, bytes]."""
    fields = [
        blocks[name].reshape(*blocks.shape, PARTS, blocks.dtype[name].shape[0] // PARTS)
        for name in ("q", "signs", "high")
        if name in (blocks.dtype.names or ())
    ]
    return np.concatenate(fields, axis=-1)


def scales_of(type: BlockType, blocks: npt.NDArray[np.void]) -> U8:
    """Return the scales that are stored apart from the parts: uint8 [..., 8, 1], or [..., 8, 0] if there are none."""
    if not GRIDS[type].scales:
        return np.empty((*blocks.shape, PARTS, 0), np.uint8)
    scales: U8 = blocks["scales"]
    if type == BlockType.IQ3_S:
        scales = np.stack([scales & np.uint8(15), scales >> np.uint8(4)], axis=-1).reshape(
            *blocks.shape, PARTS
        )
    return scales[..., None]


def meaning(type: BlockType, parts: U8, small: U8) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int16]]:
    """Decode parts [..., bytes] and their small scales [..., 0 or 1] to integers [..., 32], scales [..., 1 or 2]."""
    match type:
        case BlockType.IQ2_XS:
            pairs = parts[..., 0::2].astype(np.uint16) | parts[..., 1::2].astype(np.uint16) << 8
            index, signs = pairs & 511, _even(pairs >> 9)
        case BlockType.IQ2_S:
            high = parts[..., 8:] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
            index, signs = parts[..., :4] | high.astype(np.uint16) << 8, parts[..., 4:8]
        case BlockType.IQ3_S:
            high = parts[..., 12:] >> np.arange(8, dtype=np.uint8) & 1
            index, signs = parts[..., :8] | high.astype(np.uint16) << 8, parts[..., 8:12]
        case _:
            index = parts[..., :-4].astype(np.uint16)
            words = np.ascontiguousarray(parts[..., -4:]).view("<u4")
            signs = _even(words >> np.arange(0, 28, 7, dtype=np.uint32) & 127)
            small = (words >> 28).astype(np.uint8)
    sizes = _grid(type)[index].reshape(*parts.shape[:-1], QUANT_BLOCK)
    negative = np.unpackbits(signs.astype(np.uint8), axis=-1, bitorder="little").astype(np.int8)
    if type in (BlockType.IQ2_XS, BlockType.IQ2_S):
        small = np.concatenate([small & 15, small >> 4], axis=-1)
    return sizes * (1 - 2 * negative), 2 * small.astype(np.int16) + 1


def _even(seven: npt.NDArray[Any]) -> U8:
    """Add an eighth sign bit to seven, so that the number of negative signs is even."""
    bits = np.unpackbits(seven.astype(np.uint8)[..., None], axis=-1)
    odd = bits.sum(axis=-1, dtype=np.uint8) & 1
    signs: U8 = seven.astype(np.uint8) | odd << np.uint8(7)
    return signs


@functools.cache
def _grid(type: BlockType) -> npt.NDArray[np.int8]:
    """Return the magnitudes of each index, [indices, 8 or 4], from the gguf library."""
    import gguf.quants  # slow to import, and few models need its tables

    kind = getattr(gguf.quants, type.name)
    kind.init_grid()
    sizes: npt.NDArray[np.int8] = kind.grid.reshape(-1, kind.grid.shape[-1]).astype(np.int8)
    return sizes
