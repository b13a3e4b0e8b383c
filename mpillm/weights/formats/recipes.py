"""Matrices that files store in another form than products take: transposed, interleaved row by row, or in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.kernels.types import BlockType
from mpillm.weights.formats.extent import Lies, Rows
from mpillm.weights.formats.stored import OWN, Bytes, Stored
from mpillm.weights.io.mapped import MappedFile

MXFP4 = OWN[BlockType.MXFP4.name]


@dataclass(frozen=True)
class Raw:
    """A tensor of a safetensors file, with the bytes of one of its values."""

    file: MappedFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of all that has the same first index."""
        return self.nbytes // self.shape[0]

    def __getitem__(self, index: int) -> Raw:
        """The part with this first index."""
        return replace(
            self, shape=self.shape[1:], offset=self.offset + index * self.row_bytes, nbytes=self.row_bytes
        )

    def lies(self) -> Iterator[Lies]:
        yield self.file, self.offset, self.nbytes

    def bytes(self) -> Bytes:
        """Return the whole tensor as uint8 [first dimension, row bytes], mapped."""
        return self.file.view(self.offset, self.nbytes).reshape(self.shape[0], -1)

    def rows(self, rows: Rows) -> Bytes:
        """Some rows of it, uint8 [len(rows), row bytes]; those of a range as `MappedFile.read` reads them."""
        if not isinstance(rows, range):
            return self.bytes()[rows]
        if not rows:
            return np.empty((0, self.row_bytes), np.uint8)
        together = self.file.read(
            self.offset + rows[0] * self.row_bytes, (rows[-1] - rows[0] + 1) * self.row_bytes
        )
        return together.reshape(-1, self.row_bytes)[:: rows.step]

    def release(self, rows: Rows | None = None) -> None:
        """Give back the pages of some rows, or of all of it."""
        if not isinstance(rows, range):
            self.file.release(self.offset, self.nbytes)
        elif rows:
            first, count = rows[0], rows[-1] - rows[0] + 1
            self.file.release(self.offset + first * self.row_bytes, count * self.row_bytes)


@dataclass(frozen=True)
class TurnedRaw(Raw):
    """A tensor of single bytes, or those of all experts, whose last two dimensions the file has in turn."""

    def bytes(self) -> Bytes:
        return self.rows(np.arange(self.shape[0]))

    def rows(self, rows: Rows) -> Bytes:
        return _turned_rows(self.file.view(self.offset, self.nbytes).reshape(self.shape[::-1]), rows)

    def release(self, rows: Rows | None = None) -> None:
        self.file.release(self.offset, self.nbytes)


def _turned_rows(stored: NDArray[Any], rows: Rows) -> NDArray[Any]:
    """Return some rows of a matrix that is stored with its dimensions in turn."""
    index = slice(rows.start, rows.stop, rows.step) if isinstance(rows, range) else rows
    return np.ascontiguousarray(stored[:, index].T)


def turned(raw: Raw) -> TurnedRaw:
    """Return a tensor of single bytes with its last two dimensions in turn."""
    *outer, columns, rows = raw.shape
    return TurnedRaw(raw.file, raw.name, raw.dtype, (*outer, rows, columns), raw.offset, raw.nbytes)


@dataclass(frozen=True)
class Plain:
    """Floats as they lie: [rows, columns], a vector's values [rows], or these of all experts."""

    raw: Raw

    @property
    def stored(self) -> Stored:
        return OWN[self.raw.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def of_expert(self, expert: int) -> Plain:
        return Plain(self.raw[expert])

    def blocks(self, rows: Rows) -> Bytes:
        return self.raw.rows(rows)

    def lies(self) -> Iterator[Lies]:
        return self.raw.lies()

    def release(self, rows: Rows) -> None:
        self.raw.release(rows)


@dataclass(frozen=True)
class Transposed:
    """Floats of which columns are stored as rows, [columns, rows] or [experts, columns, rows]."""

    raw: Raw

    @property
    def stored(self) -> Stored:
        return OWN[self.raw.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, columns, rows = self.raw.shape
        return (*outer, rows, columns)

    def of_expert(self, expert: int) -> Transposed:
        return Transposed(self.raw[expert])

    def blocks(self, rows: Rows) -> Bytes:
        return _turned_rows(self.raw.bytes().view(f"u{self.stored.block_bytes}"), rows).view(np.uint8)

    def lies(self) -> Iterator[Lies]:
        return self.raw.lies()

    def release(self, rows: Rows) -> None:
        self.raw.release()


def halves_apart(pairs: Bytes) -> Bytes:
    """Nibbles [.., 2, 8] of 32 columns, the even one low, as bytes [.., 16]: columns j and 16 + j are in byte j."""
    first, second = pairs[..., 0, :], pairs[..., 1, :]
    out = np.empty((*first.shape[:-1], 16), np.uint8)
    out[..., ::2] = first & 15 | second << 4
    out[..., 1::2] = first >> 4 | second & 0xF0
    return out


@dataclass(frozen=True)
class Mxfp4:
    """e2m1 numbers, neighbouring columns in a byte, [.., rows, columns / 32, 16], and exponents [.., columns / 32]."""

    values: Raw
    exponents: Raw
    stored: Stored = MXFP4

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, count, _ = self.values.shape
        return (*outer, 32 * count)

    def of_expert(self, expert: int) -> Mxfp4:
        return Mxfp4(self.values[expert], self.exponents[expert])

    def blocks(self, rows: Rows) -> Bytes:
        exponents = self.exponents.rows(rows).copy()  # the next read takes its place
        values = self.values.rows(rows)
        out = np.empty((*exponents.shape, 17), np.uint8)
        out[..., 0] = exponents
        out[..., 1:] = halves_apart(values.reshape(*exponents.shape, 2, 8))
        return out.reshape(len(values), -1)

    def lies(self) -> Iterator[Lies]:
        yield from self.values.lies()
        yield from self.exponents.lies()

    def release(self, rows: Rows) -> None:
        self.values.release(rows)
        self.exponents.release(rows)
