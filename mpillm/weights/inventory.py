"""The tensors that a model declares: their shapes, the axes that shards share, and the pages they are loaded in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mpillm.partition.grid import Axis, Divisible, Place
from mpillm.weights.roles import Key

# Kinds of pages, in the order in which a step uses them. They are small, because the page in use and the one that is
# being loaded take memory in which others could stay.
ATTENTION, GATE, UP, DOWN, SHARED, EXPERT = "attention", "gate", "up", "down", "shared expert", "expert"
HEAD = "the output head"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model: its whole shape ([n] or [n, k]), and the axes of rows and columns that shards share.

    `matrices` > 0: each run of that many rows is a matrix of its own: the heads' matrices, one under the other.
    """

    key: Key
    shape: tuple[int, ...]
    rows: Axis | None = None
    cols: Axis | None = None
    matrices: int = 0

    def slices(self, place: Place) -> tuple[range, range, tuple[int, ...]]:
        """Return rows, columns and column panels (relative to the first column) of a rank; a vector has no panels."""
        rows = self.rows.entries(place) if self.rows else range(self.shape[0])
        if len(self.shape) == 1:
            return rows, range(1), ()
        if self.cols is None:
            return rows, range(self.shape[1]), (0, self.shape[1])
        return rows, self.cols.entries(place), self.cols.own_panels(place)

    def apart(self, rows: range) -> list[range]:
        """These rows, cut where another matrix begins."""
        if not self.matrices:
            return [rows]
        cuts = range(rows.start // self.matrices * self.matrices, rows.stop, self.matrices)
        return [range(max(cut, rows.start), min(cut + self.matrices, rows.stop)) for cut in cuts]


@dataclass(frozen=True)
class PageSpec:
    """The tensors that are loaded and evicted together: `kind` says which of a layer's pages, or the LM head."""

    kind: str
    tensors: tuple[TensorSpec, ...]
    layer: int = -1
    expert: int = -1


class Inventory(Divisible, Protocol):
    """The interface of a model for planners, loaders and packers; `ModelConfig` has it."""

    @property
    def hidden(self) -> int: ...
    @property
    def vocab(self) -> int: ...

    def pages(self, layer: int) -> Sequence[PageSpec]:
        """Return a layer's pages that every step uses, in the order of use."""

    def experts(self, layer: int) -> Sequence[PageSpec]:
        """Return a layer's experts, a page each, all alike; empty if it has none."""

    @property
    def embed(self) -> TensorSpec:
        """The table of embeddings, of which rows are read."""

    @property
    def head(self) -> PageSpec:
        """The final norm and the LM head, as far as there are such; a page without tensors is not loaded."""

    @property
    def pooled(self) -> Sequence[TensorSpec]:
        """The tensors after pooling: rank 0 reads them whole, and no page has them."""


def all_tensors(model: Inventory) -> Iterator[TensorSpec]:
    """Yield every tensor of a model."""
    yield model.embed
    yield from model.head.tensors
    yield from model.pooled
    for layer in range(model.n_layers):
        for page in (*model.pages(layer), *model.experts(layer)):
            yield from page.tensors


def tensor_name(key: Key) -> str:
    """Return the name of a tensor in messages."""
    of = "" if key.layer < 0 else f" of layer {key.layer}"
    return f"{key.role}{of}" + ("" if key.expert < 0 else f", expert {key.expert}")
