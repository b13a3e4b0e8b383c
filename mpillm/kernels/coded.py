"""BF12 in NumPy: BF16 whose high bytes are coded in 4 bits; a list has the few bytes without a code (core/coded.h)."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from mpillm.kernels.types import BF16_BLOCK, CODED_HEAD, MISFIT, PAIRED, TILE_ROWS, U8, Misfit, coded_nbytes

CODES, EXCEPTIONS = 16, 10
# Four rows of 32 columns are stored as the low bytes of the first two rows, those of the other two, and the codes. The
# bytes of two rows have the order [group of 8 columns, row, column].
PAIR = (4, 2, 8)


def code_panel(rows: npt.NDArray[np.uint16]) -> U8:
    """Code a column panel of BF16 rows [n, k] as tiles; raises Misfit if a block has too many exceptions."""
    tiles = []
    for first in range(0, len(rows), TILE_ROWS):
        tile = rows[first : first + TILE_ROWS]
        tiles += [
            _coded(tile[:, begin : begin + BF16_BLOCK]) for begin in range(0, tile.shape[1], BF16_BLOCK)
        ]
    return np.concatenate(tiles) if tiles else np.empty(0, np.uint8)


def decode_panel(packed: U8, n: int, k: int) -> npt.NDArray[np.uint16]:
    """Decode the tiles of a column panel to BF16 rows [n, k]."""
    rows = np.empty((-(-n // TILE_ROWS) * TILE_ROWS, k), np.uint16)
    at = 0
    for first, begin in itertools.product(range(0, n, TILE_ROWS), range(0, k, BF16_BLOCK)):
        width = min(BF16_BLOCK, k - begin)
        nbytes = coded_nbytes(width)
        rows[first : first + TILE_ROWS, begin : begin + width] = _decoded(packed[at : at + nbytes], width)
        at += nbytes
    return rows[:n]


def _coded(block: npt.NDArray[np.uint16]) -> U8:
    """Code one block of up to 16 rows and 256 columns."""
    high = (block >> 8).astype(np.uint8)
    counts = np.bincount(high.reshape(-1), minlength=256)
    common = np.argsort(-counts, kind="stable")[:CODES]
    common = common[counts[common] > 0]
    code_of = np.full(256, CODES, np.uint8)
    code_of[common] = np.arange(len(common))
    codes = code_of[high]
    rows, columns = np.nonzero(codes == CODES)
    if len(rows) > EXCEPTIONS:
        raise Misfit(MISFIT)
    head = np.zeros(CODED_HEAD, np.uint8)
    head[: len(common)] = common
    head[CODES] = len(rows)
    listed = np.stack([columns, rows, high[rows, columns]], axis=1)
    head[CODES + 2 : CODES + 2 + listed.size] = listed.reshape(-1)
    codes[rows, columns] = 0
    low, codes = (_in_fours(part) for part in (block.astype(np.uint8), codes))
    nibbles = codes[:, :, :1] | codes[:, :, 1:] << 4
    return np.concatenate([head, np.concatenate([low, nibbles], axis=2).reshape(-1)])


def _decoded(packed: U8, width: int) -> npt.NDArray[np.uint16]:
    """Decode a block to its 16 rows of `width` columns."""
    head, fours = packed[:CODED_HEAD], packed[CODED_HEAD:].reshape(TILE_ROWS // 4, -1, 3, 64)
    low, nibbles = fours[:, :, :2], fours[:, :, 2:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    high = _in_rows(head[codes])[:, :width]
    for column, row, byte in head[CODES + 2 :][: 3 * head[CODES]].reshape(-1, 3):
        high[row, column] = byte
    values: npt.NDArray[np.uint16] = high * np.uint16(256) + _in_rows(low)[:, :width]
    return values


def _in_fours(part: U8) -> U8:
    """Arrange bytes of up to 16 rows and 256 columns as [four rows, step, two rows, 64], padded with zeros."""
    steps = -(-part.shape[1] // PAIRED)
    padded = np.zeros((TILE_ROWS, steps * PAIRED), np.uint8)
    padded[: part.shape[0], : part.shape[1]] = part
    pairs = padded.reshape(TILE_ROWS // 4, 2, PAIR[1], steps, PAIR[0], PAIR[2])
    return np.ascontiguousarray(pairs.transpose(0, 3, 1, 4, 2, 5)).reshape(TILE_ROWS // 4, steps, 2, 64)


def _in_rows(fours: U8) -> U8:
    """Arrange the result of `_in_fours` as 16 rows again."""
    steps = fours.shape[1]
    pairs = fours.reshape(TILE_ROWS // 4, steps, 2, *PAIR).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(pairs).reshape(TILE_ROWS, steps * PAIRED)
