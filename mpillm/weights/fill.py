"""Reads the planned tensors of a source and packs them for the kernels, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.kernels.types import TILE_ROWS, BlockType
from mpillm.weights.io.reading import Bytes
from mpillm.weights.page import Page
from mpillm.weights.plan import ALIGNMENT, PagePlan, PageTensor
from mpillm.weights.roles import Key

CHUNK = 2**20  # bytes that a thread packs at a time
UNDER_WAY = 16 * 2**20  # bytes of an unpacked model that all threads together are at


class Rows(NamedTuple):
    """Rows of a matrix for `kernels.pack`: canonical blocks of `type`, and its `head` if their order is llama.cpp's."""

    type: BlockType
    data: Bytes
    head: int


class TensorReader(Protocol):
    """The interface for reading tensors; `formats.tensors.TensorSource` describes the result of each method."""

    def read_f32(self, key: Key, rows: range | NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """Return a vector, or some of its values."""

    def rows_to_pack(self, key: Key, rows: range, cols: range) -> Rows:
        """Return rows and columns of a matrix, as stored in the file where possible."""

    def head_rows(self, key: Key) -> int:
        """Return rows of a head of a matrix whose rows lie in llama.cpp's order; 0 for all others."""

    def working_row_bytes(self, key: Key) -> int:
        """Return bytes that a row of a matrix takes while it is read, beside what is delivered."""

    def release(self, key: Key, rows: range | None = None) -> None:
        """Release the memory that reading these rows has taken."""


def load(
    plan: PagePlan,
    source: TensorReader,
    buffer: Bytes,
    pool: Executor | None = None,
    chunk: int = CHUNK,
) -> Page:
    """Read a page and pack it into `buffer` (uint8 [plan.nbytes], 64-byte aligned).

    Besides the buffer, little more than `chunk` bytes for each of the pool's threads is held (and their float32
    values, where `kernels.pack` cannot convert them).
    """
    assert buffer.nbytes == plan.nbytes
    assert buffer.ctypes.data % ALIGNMENT == 0
    groups = [[(entry, buffer[entry.offset : entry.offset + entry.nbytes])] for entry in plan.entries]
    fill(groups, source, pool, chunk)
    return Page(plan, buffer)


def fill(
    groups: Iterable[Sequence[tuple[PageTensor, Bytes]]],
    source: TensorReader,
    pool: Executor | None = None,
    chunk: int = CHUNK,
) -> None:
    """Read rows of tensors and pack them, each into one or several buffers.

    The entries of a group have the same key and rows, but different columns; each has its destination. Groups that are
    neighbours in the file are read together, up to `chunk` bytes. Each thread of the pool packs chunks of its own:
    threads that share a chunk would wait for one another all the time.
    """
    groups = list(groups)
    work = list(_tasks(groups, source, chunk))
    if pool is None or len(work) == 1:
        for task in work:
            task()
        return
    tasks = [pool.submit(task) for task in work]
    wait(tasks)  # all of them, even if one fails: they write to what the caller gave
    for done in tasks:
        done.result()
    # A thread maps more than it reads, also of what another one has released.
    for key in {entries[0][0].key for entries in groups}:
        source.release(key)


class _Portion(NamedTuple):
    """Rows and columns of a matrix; its first row is row number `first` of the entries."""

    entries: Sequence[tuple[PageTensor, Bytes]]
    first: int
    rows: range
    cols: range

    @property
    def key(self) -> Key:
        return self.entries[0][0].key


def _tasks(
    groups: Iterable[Sequence[tuple[PageTensor, Bytes]]], source: TensorReader, chunk: int
) -> Iterator[Callable[[], None]]:
    """Yield the reads of the file, in order, as functions."""
    together: list[_Portion] = []
    for entries in groups:
        key, rows, type = entries[0][0].key, entries[0][0].rows, entries[0][0].type
        if not entries[0][0].bounds:
            yield partial(_fill_vector, entries, source)
            continue
        cols = range(
            min(entry.cols.start for entry, _ in entries), max(entry.cols.stop for entry, _ in entries)
        )
        head = source.head_rows(key) or 1
        unit = math.lcm(TILE_ROWS, head)
        limit = max(chunk // (max(type.row_bytes(len(cols)), source.working_row_bytes(key)) * unit), 1) * unit
        first = 0
        while first < len(rows):
            free = limit - sum(len(portion.rows) for portion in together)
            last = together[-1] if together else None
            goes_on = last and (last.key, last.cols, last.rows.stop) == (key, cols, rows[first])
            if not goes_on or free < unit or rows[first] % head:
                if together:
                    yield partial(_fill_rows, together, source)
                together, free = [], limit
            together.append(_Portion(entries, first, rows[first : first + free // unit * unit], cols))
            first += len(together[-1].rows)
    if together:
        yield partial(_fill_rows, together, source)


def _fill_vector(entries: Sequence[tuple[PageTensor, Bytes]], source: TensorReader) -> None:
    values = source.read_f32(entries[0][0].key, entries[0][0].rows)
    for _, out in entries:
        out.view(np.float32)[:] = values


def _fill_rows(portions: Sequence[_Portion], source: TensorReader) -> None:
    """Read and pack consecutive rows of a matrix."""
    key, cols, begin = portions[0].key, portions[0].cols, portions[0].rows.start
    rows = range(begin, portions[-1].rows.stop)
    stored, chunk, head = source.rows_to_pack(key, rows, cols)
    for portion in portions:
        own = chunk[portion.rows.start - begin : portion.rows.stop - begin]
        for entry, out in portion.entries:
            at = (entry.cols.start - cols.start) // stored.block * stored.block_bytes
            part = own[:, at : at + stored.row_bytes(entry.k)]
            kernels.pack(
                entry.type, part, entry.k, entry.bounds, out, 1, stored, portion.first, entry.n, head
            )
        del own, part
    del chunk
    source.release(key, rows)
