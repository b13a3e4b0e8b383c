"""The places of tensors in their files, or their recipes: rows of matrices as blocks of one type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpillm.weights.formats.stored import Bytes, Stored
from mpillm.weights.io.mapped import MappedFile

Lies = tuple[MappedFile, int, int]  # file, offset and bytes
Rows = range | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Extent:
    """The place of a tensor: rows of `shape` from `offset` on in `file`, which has the name `name` there.

    `rope_heads` > 0: rows are in the order that llama.cpp gives q and k of the llama architecture, in which the two
    halves of each of these heads are interleaved.
    """

    file: MappedFile
    name: str
    offset: int
    shape: tuple[int, ...]
    stored: Stored
    rope_heads: int = 0

    @property
    def k(self) -> int:
        return self.shape[-1]

    @property
    def n(self) -> int:
        """Rows in the file; a vector is one row."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def row_bytes(self) -> int:
        return self.stored.row_bytes(self.k)

    @property
    def working_row_bytes(self) -> int:
        """Bytes that a row takes while it is read."""
        return self.stored.working_row_bytes(self.k)

    @property
    def nbytes(self) -> int:
        return self.n * self.row_bytes

    def lies(self) -> Iterator[Lies]:
        """Yield all that is read for it."""
        yield self.file, self.offset, self.nbytes

    def vector(self) -> Bytes:
        """Return a vector as it is stored, uint8 [1, bytes]."""
        return self.file.view(self.offset, self.nbytes)[None]

    def rows(self, rows: range) -> Bytes:
        """Return rows as they are stored: uint8 [len(rows), row bytes]; a view where rows lie as they are asked for."""
        assert 0 <= rows.start <= rows.stop <= self.n, (self.name, rows)
        raw = self.rows_together(rows)
        if not self.rope_heads:
            return raw
        first = (self._span(rows)[0] - self.offset) // self.row_bytes
        gathered: Bytes = raw[llama_cpp_rows(np.asarray(rows), self.n, self.rope_heads) - first]
        return gathered

    def single_rows(self, rows: NDArray[np.integer[Any]]) -> Bytes:
        """Return rows at any places as stored, copied: uint8 [len(rows), row bytes]; nothing needs to be released."""
        nbytes = self.row_bytes
        where = llama_cpp_rows(rows, self.n, self.rope_heads).tolist()
        assert not where or 0 <= min(where) <= max(where) < self.n, (self.name, where)
        return self.file.pieces([self.offset + row * nbytes for row in where], nbytes)

    def rows_together(self, rows: range) -> Bytes:
        """Return rows in the order of the file; in llama.cpp's order, all rows of the heads that they belong to."""
        return self.file.read(*self._span(rows)).reshape(-1, self.row_bytes)

    def release(self, rows: range | None = None) -> None:
        """Give back the mapped pages of it, or of some rows."""
        self.file.release(*self._span(range(self.n) if rows is None else rows))

    def at(self, first: int) -> tuple[MappedFile, int] | None:
        """Return the place from which rows from `first` on are stored as they are delivered; None if they are not."""
        return None if self.rope_heads else (self.file, self.offset + first * self.row_bytes)

    def _span(self, rows: range) -> tuple[int, int]:
        """Offset and size of the bytes from the first of some rows to the last."""
        first, stop = rows.start, rows.stop
        if len(self.shape) == 1:
            first, stop = 0, 1
        elif self.rope_heads:  # a row comes from somewhere in its head
            head = self.n // self.rope_heads
            first, stop = first // head * head, -(-stop // head) * head
        return self.offset + first * self.row_bytes, max(stop - first, 0) * self.row_bytes


@dataclass(frozen=True)
class Interleaved(Extent):
    """Rows of a tensor that holds other matrices in between: runs of `run` rows, each `period` rows after the last.

    Of a vector, whose values are plain floats, these are runs of values.
    """

    run: int = field(kw_only=True)
    period: int = field(kw_only=True)

    def lies(self) -> Iterator[Lies]:
        yield from ((self.file, *piece) for piece in self._runs(range(self.shape[0])))

    def vector(self) -> Bytes:
        pieces = [self.file.read(*piece) for piece in self._runs(range(self.shape[0]))]
        return np.concatenate([piece.ravel() for piece in pieces])[None]

    def rows(self, rows: range) -> Bytes:
        out, done = np.empty((len(rows), self.row_bytes), np.uint8), 0
        for piece in self._runs(rows):
            part = self.file.read(*piece).reshape(-1, self.row_bytes)
            out[done : done + len(part)] = part  # the next piece may be read to the same memory
            done += len(part)
        return out

    def rows_together(self, rows: range) -> Bytes:
        return self.rows(rows)

    def release(self, rows: range | None = None) -> None:
        for piece in self._runs(range(self.shape[0]) if rows is None else rows):
            self.file.release(*piece)

    def at(self, first: int) -> None:
        return None

    def _runs(self, rows: range) -> Iterator[tuple[int, int]]:
        """Offset and size of the pieces of the file in which some rows lie."""
        first, unit = rows.start, self.row_bytes if len(self.shape) == 2 else self.row_bytes // self.k
        while first < rows.stop:
            number, inside = divmod(first, self.run)
            stop = min(rows.stop, first - inside + self.run)
            at = number * self.period + inside
            yield self.offset + at * unit, (stop - first) * unit
            first = stop


class Recipe(Protocol):
    """A recipe for a matrix, or those of all experts, from tensors of files; a vector is a matrix of one column."""

    @property
    def stored(self) -> Stored:
        """The blocks that are made; the name is that of what lies in the files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns], or [experts, rows, columns]."""

    def of_expert(self, expert: int) -> Recipe:
        """Return the recipe of one expert's matrix."""

    def blocks(self, rows: Rows) -> Bytes:
        """Some rows: uint8 [len(rows), row bytes]."""

    def lies(self) -> Iterator[Lies]:
        """Return all that is read for it."""

    def release(self, rows: Rows) -> None:
        """Give back what reading these rows has taken."""


@dataclass(frozen=True)
class Made(Extent):
    """Rows of what a recipe makes, of a vector values: those from `first` on.

    With `run` > 0 they are runs of `run` rows, each `period` rows after the last, as those of `Interleaved`.
    """

    recipe: Recipe = field(kw_only=True)
    first: int = 0
    run: int = 0
    period: int = 0

    def lies(self) -> Iterator[Lies]:
        return self.recipe.lies()

    def vector(self) -> Bytes:
        return self.recipe.blocks(self._of_recipe(range(self.k))).reshape(1, -1)

    def rows(self, rows: range) -> Bytes:
        return self.recipe.blocks(self._of_recipe(rows))

    def single_rows(self, rows: NDArray[np.integer[Any]]) -> Bytes:
        made = np.empty((len(rows), self.row_bytes), np.uint8)
        for row, out in zip(rows.tolist(), made, strict=True):
            out[:] = self.rows(range(row, row + 1))
            self.release(range(row, row + 1))
        return made

    def rows_together(self, rows: range) -> Bytes:
        return self.rows(rows)

    def release(self, rows: range | None = None) -> None:
        self.recipe.release(self._of_recipe(range(self.shape[0]) if rows is None else rows))

    def at(self, first: int) -> None:
        return None

    def piece(self, expert: int | None, shape: tuple[int, ...], first: int, run: int, period: int) -> Made:
        """Some rows of what a recipe makes, or of one expert's; `run` and `period`: see the class."""
        recipe = self.recipe if expert is None else self.recipe.of_expert(expert)
        return replace(self, shape=shape, recipe=recipe, first=first, run=run, period=period)

    def _of_recipe(self, rows: range) -> Rows:
        if not self.run:
            return range(self.first + rows.start, self.first + rows.stop)
        if self.run == 1:
            return range(
                self.first + rows.start * self.period, self.first + rows.stop * self.period, self.period
            )
        number, inside = np.divmod(np.arange(rows.start, rows.stop), self.run)
        return self.first + number * self.period + inside


def llama_cpp_rows(rows: NDArray[np.integer[Any]], n: int, heads: int) -> NDArray[np.integer[Any]]:
    """Return the rows of q or k in a GGUF file of the llama architecture; `rows` itself for 0 heads.

    convert_hf_to_gguf.py's `permute` writes row (head, half, j) at (head, j, half).
    """
    if not heads:
        return rows
    size = n // heads
    head, inside = np.divmod(rows, size)
    half, j = np.divmod(inside, size // 2)
    result: NDArray[np.integer[Any]] = head * size + 2 * j + half
    return result
