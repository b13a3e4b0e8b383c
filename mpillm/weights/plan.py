"""The plan of a rank's weights: rows and columns of each tensor, and their place in memory, from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from mpillm.kernels.types import BlockType, packed_nbytes
from mpillm.partition.grid import Place, panel_bounds
from mpillm.weights.inventory import HEAD, TensorSpec
from mpillm.weights.roles import ROLES, Key

ROW_PANELS = 4  # with fewer W8A8 is less exact, with more it is slower
ALIGNMENT = 64  # the alignment of every entry in the buffer: a cache line, and the widest vector


@dataclass(frozen=True)
class PageTensor:
    """The rows and columns of a tensor that a rank holds, as `nbytes` bytes at `offset` in the buffer of a page.

    `bounds` are the column panels, relative to the first column; a vector (`type` F32, no `bounds`) has one column.
    """

    key: Key
    rows: range
    cols: range
    type: BlockType
    bounds: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def k(self) -> int:
        return len(self.cols)


@dataclass(frozen=True)
class PagePlan:
    """The plan of a page on a rank: `nbytes` is the size of its buffer, `kind` says which of the layer's pages it is.

    A tensor may have several entries: the matrices of heads. In a packed model the buffer is the bytes from `offset` on
    in file number `file`, and entries may be the parts of one matrix in order. Experts of a layer are all alike there,
    and may share the entries of the first one.
    """

    name: str
    entries: tuple[PageTensor, ...]
    nbytes: int
    layer: int = -1
    kind: str = HEAD
    file: int = -1
    offset: int = 0
    expert: int = -1

    @cached_property
    def values(self) -> Counter[BlockType]:
        """The number of values of matrices, by type."""
        counts = Counter[BlockType]()
        for entry in self.entries:
            if entry.bounds:
                counts[entry.type] += entry.n * entry.k
        return counts

    @cached_property
    def index(self) -> dict[str, tuple[PageTensor, ...]]:
        """Entries by role."""
        found: dict[str, tuple[PageTensor, ...]] = {}
        for entry in self.entries:
            found[entry.key.role] = (*found.get(entry.key.role, ()), entry)
        return found


def plan_entries(
    tensors: Sequence[TensorSpec], place: Place, type_of: Callable[[Key], BlockType]
) -> tuple[tuple[PageTensor, ...], int]:
    """Return the entries of these tensors on a rank, each at a multiple of ALIGNMENT, and the bytes of all."""
    entries, offset = [], 0
    for tensor in tensors:
        rows, cols, bounds = tensor.slices(place)
        for part in tensor.apart(rows):
            entries.append(plan_entry(tensor.key, part, cols, bounds, type_of(tensor.key), offset))
            offset += aligned(entries[-1].nbytes)
    return tuple(entries), offset


def plan_entry(
    key: Key, rows: range, cols: range, bounds: tuple[int, ...], type: BlockType, offset: int
) -> PageTensor:
    """Return an entry of some rows and columns; vectors are float32 whatever they are stored as."""
    if not bounds:
        return PageTensor(key, rows, cols, BlockType.F32, bounds, offset, 4 * len(rows))
    if not ROLES[key.role].by_columns:
        bounds = panels_of_rows(type, len(cols))
    nbytes = _matrix_nbytes(type, len(rows), len(cols), bounds)
    return PageTensor(key, rows, cols, type, bounds, offset, nbytes)


@lru_cache(maxsize=1024)
def panels_of_rows(type: BlockType, k: int) -> tuple[int, ...]:
    """Return the column panels of a matrix whose rows shards share: one, or several if columns share scales."""
    if not type.whole:
        return 0, k
    blocks = -(-k // type.block)
    return panel_bounds(k, type.block, min(ROW_PANELS, 1 << (blocks.bit_length() - 1)))


@lru_cache(maxsize=1024)
def _matrix_nbytes(type: BlockType, n: int, k: int, bounds: tuple[int, ...]) -> int:
    """`packed_nbytes`, for layers and heads repeat the same few matrices."""
    return packed_nbytes(type, n, k, bounds)


def page_name(kind: str, layer: int, expert: int = -1) -> str:
    """Return the name of a page in messages."""
    return kind if layer < 0 else f"layer {layer}, {kind}" + (f" {expert}" if expert >= 0 else "")


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Return the next multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment
