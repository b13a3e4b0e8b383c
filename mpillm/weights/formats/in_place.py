"""Pages of an unpacked model that stay, used where they lie in files: floats for good, blocks until they are packed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

from mpillm.weights.fill import CHUNK, UNDER_WAY, TensorReader, fill
from mpillm.weights.io.filesystem import cached
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.io.numa import spread
from mpillm.weights.io.reading import Bytes, new_buffer, open_file
from mpillm.weights.page import Page, Placed
from mpillm.weights.paging.loaders import MappingLoader
from mpillm.weights.plan import ALIGNMENT, PagePlan, PageTensor, aligned

GAP = 64 * 2**10  # bytes between tensors of one run, at most
LONG = 16 * 2**20  # bytes of a run that is read as huge pages, at least


class StoredRows(NamedTuple):
    """Rows in file number `file`, `nbytes` from `offset` on, each `row_bytes` long."""

    file: int
    offset: int
    nbytes: int
    row_bytes: int


class TensorFiles(TensorReader, Protocol):
    """Tensors in mapped files; `formats.tensors.TensorSource` is one."""

    path: Path
    mapped: tuple[MappedFile, ...]

    def in_place(self, entry: PageTensor) -> StoredRows | None:
        """Return the places of planned tensors that products can use as they are."""

    def in_file(self, entry: PageTensor) -> bool:
        """Return whether it is used there for good: blocks are not, for products with packed ones are faster."""

    def read_past_cache(self) -> None:
        """From now on rows of matrices are read past the page cache."""


def warm(source: TensorFiles, entries: Sequence[PageTensor]) -> bool:
    """Return whether the page cache has, most likely, all entries that can be used in place, and there are some."""
    places = [there for entry in entries if (there := source.in_place(entry))]
    with ExitStack() as stack:
        files: dict[int, int] = {}
        for number in {there.file for there in places}:
            files[number] = open_file(source.mapped[number].path, os.O_RDONLY)
            stack.callback(os.close, files[number])
        return bool(places) and all(cached(files[there.file], there.offset, there.nbytes) for there in places)


class InPlaceLoader(MappingLoader):
    """Pages whose matrices are used where they lie in the files, which ranks of a node share.

    What products cannot take so (vectors, rows in another order, columns of a matrix) is made ready in a buffer beside.
    Before the second step blocks in place are packed, which products take faster; the buffers beside stay. Neither way
    changes a result.

    The files are mapped once more for it, for what is read of them otherwise gives its pages back.
    """

    takes_any_buffer = False

    def __init__(self, source: TensorFiles, pages: Sequence[PagePlan], threads: int, parallel: int) -> None:
        super().__init__(source.mapped, parallel)
        self._source = source
        self._threads = threads
        for number, begin, end in self._runs(pages):
            if not cached(self._files[number].descriptor, begin, end - begin):
                self._maps[number].read_huge(begin, end - begin)
        self._to_pack = [page for page in pages if any(map(self._for_now, page.entries))]
        # By page, of what is not packed anew.
        self._places = {page.name: dict[int, Placed]() for page in self._to_pack}

    def _runs(self, pages: Sequence[PagePlan]) -> list[tuple[int, int, int]]:
        """Return the file, begin and end of long runs of bytes that are used in place, with small gaps such as norms.

        Only those are read as huge pages: each takes a mapping of its own, of which a process may have about 65,000.
        """
        found = (self._source.in_place(entry) for page in pages for entry in page.entries)
        places = sorted({(there.file, there.offset, there.offset + there.nbytes) for there in found if there})
        runs: list[tuple[int, int, int]] = []
        for number, begin, end in places:
            if runs and runs[-1][0] == number and begin - runs[-1][2] <= GAP:
                _, begin, before = runs.pop()
                end = max(end, before)
            runs.append((number, begin, end))
        return [run for run in runs if run[2] - run[1] >= LONG]

    def allocate(self, plan: PagePlan, dropped: list[Bytes]) -> Bytes:
        memory = new_buffer(
            _nbytes(entry for entry in plan.entries if not self._source.in_place(entry)), ALIGNMENT
        )
        spread(memory, self._threads)
        return memory

    def load(self, plan: PagePlan, buffer: Bytes) -> Page:
        places = dict[int, Placed]()
        for entry in plan.entries:
            if there := self._source.in_place(entry):
                memory = self._maps[there.file].view(there.offset, there.nbytes)
                self._make_resident(there.file, memory)
                places[entry.offset] = Placed(memory, there.row_bytes)
        places |= self._filled([entry for entry in plan.entries if entry.offset not in places], buffer)
        if plan.name in self._places:
            self._places[plan.name] = {
                entry.offset: places[entry.offset] for entry in plan.entries if not self._for_now(entry)
            }
        return Page(plan, buffer, places)

    def renewed(self) -> Iterator[tuple[PagePlan, Page]]:
        """Pack the pages that have blocks in place, the first time that this is called.

        Page after page, each with all threads and after its map has gone: it is never in memory twice, if the one
        before is dropped as the next one comes.
        """
        to_pack, self._to_pack = self._to_pack, []
        if not to_pack:
            return
        blocks = [list(filter(self._for_now, plan.entries)) for plan in to_pack]
        sizes = list(map(_nbytes, blocks))
        memory = new_buffer(sum(sizes), ALIGNMENT)
        spread(memory, self._threads)
        with ThreadPoolExecutor(self._threads, "weights-packed") as pool:
            for plan, entries, size, end in zip(to_pack, blocks, sizes, accumulate(sizes), strict=True):
                self._unmap(entries)
                own = memory[end - size : end]
                yield plan, Page(plan, own, self._places.pop(plan.name) | self._filled(entries, own, pool))

    def release(self, plan: PagePlan) -> None:
        """Keep the maps until the files are closed; the next run finds the pages where they are."""

    def _unmap(self, entries: Iterable[PageTensor]) -> None:
        """Give back the mapped pages of blocks that are packed now."""
        for entry in entries:
            if there := self._source.in_place(entry):
                self._maps[there.file].release(there.offset, there.nbytes)

    def _for_now(self, entry: PageTensor) -> bool:
        return self._source.in_place(entry) is not None and not self._source.in_file(entry)

    def _filled(
        self, entries: Sequence[PageTensor], buffer: Bytes, pool: Executor | None = None
    ) -> dict[int, Placed]:
        """Return the places of entries that are made ready in a buffer, one behind the other."""
        ends = accumulate(aligned(entry.nbytes) for entry in entries)
        places = {
            entry.offset: Placed(buffer[(first := end - aligned(entry.nbytes)) : first + entry.nbytes], 0)
            for entry, end in zip(entries, ends, strict=True)
        }
        made = [[(entry, places[entry.offset].data)] for entry in entries]
        fill(made, self._source, pool, min(CHUNK, UNDER_WAY // self._threads))
        return places


def _nbytes(entries: Iterable[PageTensor]) -> int:
    """Return bytes of entries that are made ready in a buffer."""
    return sum(aligned(entry.nbytes) for entry in entries)
