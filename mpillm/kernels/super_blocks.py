"""K-quants in NumPy: blocks of 256 values in 8 parts of 32, each with small scales of its own (core/super.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpillm.kernels import grid_blocks
from mpillm.kernels.types import F32, QUANT_BLOCK, SUPER_BLOCK, TILE_ROWS, U8, BlockType

PARTS = SUPER_BLOCK // QUANT_BLOCK
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)

CANONICAL = {
    BlockType.Q4_K: np.dtype([("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("low", "u1", 128)]),
    BlockType.Q5_K: np.dtype(
        [("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("high", "u1", 32), ("low", "u1", 128)]
    ),
    BlockType.Q6_K: np.dtype([("low", "u1", 128), ("high", "u1", 64), ("scales", "u1", 16), ("d", "<f2")]),
    BlockType.IQ4_XS: np.dtype([("d", "<f2"), ("scales", "u1", 6), ("low", "u1", 128)]),
    BlockType.Q3_K: np.dtype([("high", "u1", 32), ("low", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
    BlockType.Q2_K: np.dtype([("scales", "u1", 16), ("low", "u1", 64), ("d", "<f2"), ("m", "<f2")]),
    **grid_blocks.CANONICAL,
}


class BitFields(NamedTuple):
    """The widths of the bit fields of a value, lowest bits first, and the bytes of a part's small scales."""

    bits: tuple[int, ...]
    scales: int


FIELDS = {
    BlockType.Q4_K: BitFields((4,), 2),
    BlockType.Q5_K: BitFields((4, 1), 2),
    BlockType.Q6_K: BitFields((4, 2), 2),
    BlockType.IQ4_XS: BitFields((4,), 1),
    BlockType.Q3_K: BitFields((2, 1), 2),
    BlockType.Q2_K: BitFields((2,), 2),
}
# Types whose parts have a scale for each half.
HALVED = {BlockType.Q6_K, BlockType.Q3_K, BlockType.Q2_K, BlockType.IQ2_XS, BlockType.IQ2_S}
ZERO = {BlockType.Q6_K: 32, BlockType.Q3_K: 4}  # the stored integer that stands for zero


def _packed(type: BlockType) -> np.dtype[Any]:
    """Return the dtype of a tile's block: scales of 16 blocks, then the parts' small scales, then the values."""
    numbers = [(name, "<f2", TILE_ROWS) for name in ("d", "m") if name in (CANONICAL[type].names or ())]
    if grid := grid_blocks.GRIDS.get(type):
        return np.dtype(
            [
                ("d", "<f2", TILE_ROWS),
                ("scales", "u1", (PARTS, int(grid.scales), TILE_ROWS)),
                ("q", "u1", (PARTS, 1, TILE_ROWS, grid.bytes)),
            ]
        )
    bits, scales = FIELDS[type]
    return np.dtype(
        [
            *numbers,
            ("scales", "u1", (PARTS, scales, TILE_ROWS)),
            ("q", "u1", (PARTS, sum(bits), TILE_ROWS, 4)),
        ]
    )


PACKED = {type: _packed(type) for type in CANONICAL}


class Parts(NamedTuple):
    """Parts of rows: a value is d * scale * q - m * minimum; scales and minima are for a whole part or each half."""

    q: npt.NDArray[np.int8]  # [..., 32]
    scale: npt.NDArray[np.int16]  # [..., 1 or 2]
    minimum: U8 | None  # [..., 1 or 2]


def meaning(type: BlockType, words: U8, small: U8) -> Parts:
    """Decode the words of parts (see `words_of`) and their small scales (see `small_scales`)."""
    if type in grid_blocks.GRIDS:
        return Parts(*grid_blocks.meaning(type, words[..., 0, :], small), None)
    low, *high = FIELDS[type].bits
    q = columns_of(words[..., :low, :], low)
    for bits in high:
        q |= columns_of(words[..., low : low + bits, :], bits) << np.uint8(low)
    if type == BlockType.IQ4_XS:
        return Parts(IQ4[q], small.view(np.int8).astype(np.int16), None)
    signed = (q - np.uint8(ZERO.get(type, 0))).view(np.int8)
    if type == BlockType.Q2_K:
        return Parts(signed, (small & 15).astype(np.int16), small >> np.uint8(4))
    if type in HALVED:
        return Parts(signed, small.view(np.int8).astype(np.int16), None)
    return Parts(signed, small[..., :1].astype(np.int16), small[..., 1:])


def words_of(type: BlockType, blocks: npt.NDArray[np.void]) -> U8:
    """Return the parts of canonical blocks as tiles store them, without scales: uint8 [..., 8, words, 4].

    For IQ2 and IQ3 the shape is [..., 8, 1, bytes].
    """
    if type in grid_blocks.GRIDS:
        return grid_blocks.parts_of(blocks)[..., None, :]
    q, done, fields = integers(type, blocks), 0, []
    for bits in FIELDS[type].bits:
        fields.append(field_of(q >> np.uint8(done) & np.uint8(2**bits - 1), bits))
        done += bits
    return np.concatenate(fields, axis=-2)


def field_of(q: U8, bits: int) -> U8:
    """Pack one bit field of columns [..., 32] as a tile stores it: words [..., bits, 4].

    The two nibbles of a byte belong to columns 16 apart. The smaller fields of a word belong to neighbouring groups of
    4 columns.
    """
    groups = q.reshape(*q.shape[:-1], 8, 4)
    if bits == 4:
        pairs: U8 = groups[..., :4, :] | groups[..., 4:, :] << np.uint8(4)
        return pairs
    places = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    words: U8 = np.bitwise_or.reduce(groups.reshape(*q.shape[:-1], bits, 8 // bits, 4) << places, axis=-2)
    return words


def columns_of(words: U8, bits: int) -> U8:
    """Return the inverse of `field_of`."""
    if bits == 4:
        groups = np.concatenate([words & 15, words >> 4], axis=-2)
    else:
        places = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
        groups = words[..., None, :] >> places & np.uint8(2**bits - 1)
    return groups.reshape(*words.shape[:-2], QUANT_BLOCK)


def integers(type: BlockType, blocks: npt.NDArray[np.void]) -> U8:
    """Return the stored integers of the values of canonical blocks, uint8 [..., 8, 32]."""
    low, *high = FIELDS[type].bits
    # The low fields of `together` bytes belong to neighbouring columns, their next fields to the columns after those.
    together = {BlockType.Q6_K: 64, BlockType.IQ4_XS: 16}.get(type, 32)
    q = _turns(blocks["low"], together, low).reshape(*blocks.shape, PARTS, QUANT_BLOCK)
    for bits in high:
        q |= _turns(blocks["high"], QUANT_BLOCK, bits).reshape(q.shape) << np.uint8(low)
    return q


def _turns(stored: U8, together: int, bits: int) -> U8:
    places = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    groups = stored.reshape(*stored.shape[:-1], stored.shape[-1] // together, 1, together)
    parts: U8 = groups >> places & np.uint8(2**bits - 1)
    return parts


def small_scales(type: BlockType, blocks: npt.NDArray[np.void]) -> U8:
    """Return the small scales of each part of canonical blocks as tiles store them: uint8 [..., 8, 0, 1 or 2].

    A part has a scale and a minimum, or two scales (int8), or one (int8). A part of Q2_K has two bytes with a scale and
    a minimum each. For IQ2 and IQ3 see `grid_blocks.scales_of`.
    """
    if type in grid_blocks.GRIDS:
        return grid_blocks.scales_of(type, blocks)
    q = blocks["scales"]
    if type == BlockType.IQ4_XS:
        high = q[..., :2, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
        low = np.stack([q[..., 2:] & 15, q[..., 2:] >> 4], axis=-1)
        scale = low.reshape(*blocks.shape, PARTS) | high.reshape(*blocks.shape, PARTS) << 4
        signed: U8 = (scale - np.uint8(32))[..., None]
        return signed
    if type == BlockType.Q3_K:
        low = np.concatenate([q[..., :8] & 15, q[..., :8] >> 4], axis=-1)
        high = q[..., None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
        q = (low | high.reshape(low.shape) << 4) - np.uint8(32)
    if type in HALVED:
        halves: U8 = q.reshape(*blocks.shape, PARTS, 2)
        return halves
    first, second, mixed = q[..., :4], q[..., 4:8], q[..., 8:]
    scale = np.concatenate([first & 63, mixed & 15 | first >> 6 << 4], axis=-1)
    minimum = np.concatenate([second & 63, mixed >> 4 | second >> 6 << 4], axis=-1)
    return np.stack([scale, minimum], axis=-1)


def block_scale(type: BlockType, blocks: npt.NDArray[np.void]) -> F32:
    """Return the factor of the small scales of each block, which may be canonical or packed."""
    d: F32 = blocks["d"].astype(np.float32)
    return d * np.float32(grid_blocks.GRIDS[type].unit) if type in grid_blocks.GRIDS else d


def decode_super(type: BlockType, blocks: npt.NDArray[np.void]) -> F32:
    """Decode canonical blocks to f32 [..., 256]; the products are exact, so each value is rounded once."""
    q, scale, minimum = meaning(type, words_of(type, blocks), small_scales(type, blocks))
    halves = q.reshape(*q.shape[:-1], 2, 16)
    with np.errstate(all="ignore"):
        values = block_scale(type, blocks)[..., None, None, None] * scale[..., None] * halves
        if minimum is not None:
            values = values - blocks["m"].astype(np.float32)[..., None, None, None] * minimum[..., None]
    return values.reshape(*blocks.shape, SUPER_BLOCK)


def interleaved_super(type: BlockType, source: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Interleave canonical blocks [tile, block, 16] as tiles [tile, block]."""
    packed = np.empty(source.shape[:2], PACKED[type])
    for number in {"d", "m"} & set(source.dtype.names or ()):
        packed[number] = source[number]
    packed["scales"] = small_scales(type, source).transpose(0, 1, 3, 4, 2)
    packed["q"] = words_of(type, source).transpose(0, 1, 3, 4, 2, 5)  # tile, block, part, word, row, byte
    return packed
