"""Integers with a scale, and perhaps a zero, for each group of columns, and the blocks that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mpillm.kernels.blocks import CANONICAL
from mpillm.kernels.types import QUANT_BLOCK, BlockType
from mpillm.weights.formats.extent import Lies, Rows
from mpillm.weights.formats.quantised.scales import (
    Ints,
    array_of,
    floats_of,
    indices,
    stored_as,
    to_5_bits,
    to_f16,
    to_q4,
    to_q8_0,
)
from mpillm.weights.formats.recipes import Raw
from mpillm.weights.formats.stored import OWN, Bytes, Floats, Stored


def integer_type(bits: int, zeros: bool, columns: int) -> BlockType:
    """Return the type of blocks that hold such integers, with zeros of their own or without.

    `columns` share a scale, one after the other; F16 if a block would need several scales (0 columns: in any order), or
    if what is left of 8 bits without a zero would need 9.
    """
    if not columns or columns % QUANT_BLOCK or (zeros and bits == 8):
        return BlockType.F16
    if bits > 5:
        return BlockType.Q8_0
    if zeros:
        return BlockType.Q4_1 if bits < 5 else BlockType.Q5_1
    return BlockType.Q4_0 if bits < 5 else BlockType.Q5_0


def to_w8a8(q: NDArray[np.int8], scales: Floats) -> Bytes:
    """W8A8 of integers [n, k] and scales [n, 1], both as they are."""
    out = np.empty((len(q), q.shape[1] // QUANT_BLOCK), CANONICAL[BlockType.W8A8])
    out["d"], out["q"] = scales, q.view(np.uint8).reshape(*out.shape, QUANT_BLOCK)
    return out.view(np.uint8).reshape(len(q), -1)


def integer_blocks(
    type: BlockType,
    bits: int,
    q: Ints,
    scales: Floats,
    zeros: Ints | None = None,
    groups: Ints | None = None,
) -> Bytes:
    """Return rows of W[o, i] = scales[o, g] * (q[o, i] - zeros[o, g]), where g is the group of column i.

    `q` [n, k] of 0 to 2^bits - 1, `scales` and `zeros` [n, groups]; without zeros these are all half of the range.
    Groups are neighbouring columns unless `groups` [k] tells them.
    """
    k = q.shape[1]
    each, middle = k // scales.shape[1], 2 ** (bits - 1)
    if type in (BlockType.F16, BlockType.Q8_0):
        group = np.arange(k) // each if groups is None else groups
        centred = q.astype(np.int16) - (middle if zeros is None else zeros.astype(np.int16)[:, group])
        if type is BlockType.F16:
            return to_f16(centred.astype(np.float32) * scales[:, group])
        return to_q8_0(centred.astype(np.int8), _by_block(scales, each))
    pack = to_q4 if bits < 5 else to_5_bits
    if zeros is None:
        of_type = 8 if bits < 5 else 16
        return pack((q + (of_type - middle)).astype(np.uint8), _by_block(scales, each))
    return pack(q.astype(np.uint8), _by_block(scales, each), _by_block(zeros.astype(np.float32), each))


def _by_block(values: Floats, columns: int) -> Floats:
    """Return the value of each group of `columns`, for each block of it."""
    repeated: Floats = np.repeat(values, columns // QUANT_BLOCK, axis=1)
    return repeated


@dataclass(frozen=True)
class Int8:
    """Integers [rows, columns] less their zeros, times `factor` times scales [rows or 1, groups].

    `w8a8`: the checkpoint is made for products with activations that are rounded to int8, too.
    """

    values: Raw
    scales: Raw
    zeros: Raw | None = None
    factor: float = 1.0
    w8a8: bool = False

    @cached_property
    def stored(self) -> Stored:
        """W8A8 of rows without zeros that have one scale, else Q8_0 of these integers, or F16; see `integer_type`."""
        groups = self.scales.shape[1] if len(self.scales.shape) > 1 else 1
        if self.w8a8 and self.zeros is None and groups == 1 and self.shape[1] % QUANT_BLOCK == 0:
            return OWN[BlockType.W8A8.name]
        return stored_as("INT8", integer_type(8, self.zeros is not None, self.shape[1] // groups))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def of_expert(self, expert: int) -> Int8:
        raise AssertionError("each expert has tensors of its own")

    def blocks(self, rows: Rows) -> Bytes:
        index, raw = indices(rows), self.values.rows(rows)
        scales = rows_of(by_row(floats_of(self.scales)), index) * np.float32(self.factor)
        if self.stored.type is BlockType.W8A8:
            return to_w8a8(raw.view(np.int8), scales)
        q = raw ^ 128
        zeros = None
        if self.zeros is not None:
            zeros = rows_of(by_row(array_of(self.zeros)), index).astype(np.int16) + 128
        return integer_blocks(self.stored.type, 8, q, scales, zeros)

    def lies(self) -> Iterator[Lies]:
        for raw in (self.values, self.scales, *([self.zeros] if self.zeros else [])):
            yield from raw.lies()

    def release(self, rows: Rows) -> None:
        self.values.release(rows)


@dataclass(frozen=True)
class Mxfp6:
    """e2m3 numbers, four in three bytes, lowest bits first, and exponents of 32 columns: Q8_0, exactly."""

    values: Raw
    exponents: Raw
    stored = stored_as("MXFP6", BlockType.Q8_0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.exponents.shape[0], QUANT_BLOCK * self.exponents.shape[1]

    def of_expert(self, expert: int) -> Mxfp6:
        raise AssertionError("each expert has tensors of its own")

    def blocks(self, rows: Rows) -> Bytes:
        three = self.values.rows(rows).reshape(len(rows), -1, 3).astype(np.uint32)
        words = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
        codes = (words[..., None] >> np.arange(0, 24, 6, dtype=np.uint32) & 63).reshape(len(rows), -1)
        exponents = self.exponents.bytes()[indices(rows)]
        return to_q8_0(_E2M3[codes], exponents_of(exponents) / np.float32(8))

    def lies(self) -> Iterator[Lies]:
        yield from self.values.lies()
        yield from self.exponents.lies()

    def release(self, rows: Rows) -> None:
        self.values.release(rows)


def exponents_of(raw: Bytes) -> Floats:
    """Powers of two of e8m0 bytes."""
    powers: Floats = raw.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return powers


def by_row(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values of rows, or the value of all of them together, as [rows or 1, groups]."""
    return values if values.ndim == 2 else values.reshape(-1, 1)


def rows_of(values: NDArray[Any], index: Ints) -> NDArray[Any]:
    """Some rows of [rows or 1, groups]."""
    return values[index if len(values) > 1 else index * 0]


def _e2m3() -> NDArray[np.int8]:
    """Eight times what each code of six bits stands for: sign, two bits of exponent, three of mantissa."""
    code = np.arange(32)
    exponent, mantissa = code >> 3, code & 7
    magnitude = np.where(exponent, (8 + mantissa) << np.maximum(exponent - 1, 0), mantissa)
    return np.concatenate([magnitude, -magnitude]).astype(np.int8)


_E2M3 = _e2m3()
