"""A loaded page: its matrices and vectors, as views of the memory that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpillm.kernels.adapted import LowRank
from mpillm.kernels.types import BlockType
from mpillm.weights.io.reading import Bytes
from mpillm.weights.plan import PagePlan, PageTensor

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

T = TypeVar("T")


@dataclass(frozen=True)
class Matrix:
    """A kernel-ready matrix [n, k]: `data` is uint8, packed in column panels `bounds` (int32, P + 1).

    If `row_bytes` > 0, it is not packed: `data` has rows that lie `row_bytes` apart, as in their file.

    In packed models a matrix may consist of `parts` (`data` is then empty). They are matrices with all of its columns,
    one below the other, or with all of its rows and some of its column panels, side by side.
    """

    type: BlockType
    n: int
    k: int
    bounds: Ints
    data: Bytes
    parts: tuple[Matrix, ...] = ()
    row_bytes: int = 0


@dataclass(frozen=True)
class AdaptedMatrix(Matrix):
    """A matrix to whose products adapters add, as `kernels.adapted` takes it."""

    low: tuple[LowRank, ...] = ()

    @staticmethod
    def of(matrix: Matrix, low: Sequence[LowRank]) -> AdaptedMatrix:
        """Return the matrix with the factors of its adapters."""
        own = {field.name: getattr(matrix, field.name) for field in fields(matrix)}
        return AdaptedMatrix(**own, low=tuple(low))


class Placed(NamedTuple):
    """The memory of an entry; if `row_bytes` > 0, it has rows that lie `row_bytes` apart, as in their file."""

    data: Bytes
    row_bytes: int


class Page:
    """The matrices and vectors of a page, as views of its buffer, until it is dropped."""

    adapted = False  # whether adapters add to some of its matrices

    def __init__(self, plan: PagePlan, buffer: Bytes, places: Mapping[int, Placed] | None = None) -> None:
        """`places`: the entries by their planned offsets, if they are not at these offsets in the buffer."""
        self.plan = plan
        self.buffer = buffer
        self._places = places
        self._kept: Any = None

    def matrices(self, role: str) -> tuple[Matrix, ...]:
        """Return the matrices of a tensor that has one for each head."""
        return tuple(self._matrix(entry) for entry in self.plan.index[role])

    def matrix(self, role: str) -> Matrix:
        """Return a matrix of the page."""
        parts = self.matrices(role)
        if len(parts) == 1:
            return parts[0]
        first, second, *_ = self.plan.index[role]
        n, k, bounds = first.n, first.k, parts[0].bounds
        if first.rows == second.rows:
            starts = np.cumsum([0, *(part.k for part in parts)], dtype=np.int32)
            bounds = np.concatenate(
                [
                    np.zeros(1, np.int32),
                    *(part.bounds[1:] + start for part, start in zip(parts, starts, strict=False)),
                ]
            )
            k = int(starts[-1])
        else:
            n = sum(part.n for part in parts)
        return Matrix(first.type, n, k, bounds, self.buffer[:0], parts)

    def vector(self, role: str) -> Floats:
        """Return a norm's weights, or a bias: f32 [n]."""
        entries = self.plan.index[role]
        assert not entries[0].bounds, role
        values = [self._place(entry).data.view(np.float32) for entry in entries]
        return values[0] if len(values) == 1 else np.concatenate(values)

    def keep(self, make: Callable[[Page], T]) -> T:
        """Return the result of `make(page)`, which is called once for as long as the page stays in memory."""
        if self._kept is None:
            self._kept = make(self)
        kept: T = self._kept
        return kept

    def drop(self) -> None:
        """Release the buffer."""
        self.buffer = np.empty(0, np.uint8)
        self._places = None
        self._kept = None

    def _matrix(self, entry: PageTensor) -> Matrix:
        assert entry.bounds, entry.key
        data, row_bytes = self._place(entry)
        bounds = np.array(entry.bounds, np.int32)
        return Matrix(entry.type, entry.n, entry.k, bounds, data, row_bytes=row_bytes)

    def _place(self, entry: PageTensor) -> Placed:
        if self._places is not None:
            return self._places[entry.offset]
        assert self.buffer.nbytes == self.plan.nbytes, f"{self.plan.name} is used after it was dropped"
        return Placed(self.buffer[entry.offset : entry.offset + entry.nbytes], 0)


class AdaptedPage(Page):
    """A page as a step sees it in which adapters add to some matrices: `low` has what they add, by role."""

    adapted = True

    def __init__(self, page: Page, low: Mapping[str, Sequence[LowRank]]) -> None:
        super().__init__(page.plan, page.buffer, page._places)
        self._low = low

    def matrix(self, role: str) -> Matrix:
        found = super().matrix(role)
        return AdaptedMatrix.of(found, self._low[role]) if role in self._low else found
