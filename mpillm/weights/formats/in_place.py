"""Pages of an unpacked model that stay, used where they lie in files: floats for good, blocks until they are packed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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
        """Where what is planned lies just as products can take it."""

    def in_file(self, entry: PageTensor) -> bool:
        """Whether it is used there for good: blocks are not, for products with packed ones are faster."""

    def read_past_cache(self) -> None:
        """From now on rows of matrices are read past the page cache."""


def warm(source: TensorFiles, entries: Sequence[PageTensor]) -> bool:
    """Whether the page cache has, most likely, all entries that can be used in place, and there are some."""
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
    Pages that have blocks in place are made once more before the second step: with all blocks packed, which products
    take faster. Neither way changes a result.

    The files are mapped once more for it, for what is read of them otherwise gives its pages back.
    """

    takes_any_buffer = False

    def __init__(self, source: TensorFiles, pages: Sequence[PagePlan], threads: int, parallel: int) -> None:
        super().__init__(source.mapped, parallel)
        self._source = source
        self._threads = threads
        self._to_pack = [page for page in pages if any(map(self._for_now, page.entries))]

    def allocate(self, plan: PagePlan, dropped: list[Bytes]) -> Bytes:
        return new_buffer(self._beside(plan, self._source.in_place), ALIGNMENT)

    def load(self, plan: PagePlan, buffer: Bytes) -> Page:
        return self._laid_out(plan, buffer, self._source.in_place)

    def renewed(self) -> Iterator[tuple[PagePlan, Page]]:
        """Pack the pages that have blocks in place, the first time that this is called.

        Page after page, each with all threads and after its map has gone: it is never in memory twice, if the one
        before is dropped as the next one comes.
        """
        to_pack, self._to_pack = self._to_pack, []
        if not to_pack:
            return
        sizes = [self._beside(plan, self._for_good) for plan in to_pack]
        memory = new_buffer(sum(sizes), ALIGNMENT)
        spread(memory, self._threads)
        with ThreadPoolExecutor(self._threads, "weights-packed") as pool:
            for plan, size, end in zip(to_pack, sizes, accumulate(sizes), strict=True):
                self._unmap(plan)
                yield plan, self._laid_out(plan, memory[end - size : end], self._for_good, pool)

    def release(self, plan: PagePlan) -> None:
        """The maps go when the files are closed: the next run finds the pages where they are."""

    def _unmap(self, plan: PagePlan) -> None:
        """Give back the mapped pages of blocks that are packed now."""
        for entry in filter(self._for_now, plan.entries):
            if there := self._source.in_place(entry):
                self._maps[there.file].release(there.offset, there.nbytes)

    def _for_good(self, entry: PageTensor) -> StoredRows | None:
        return self._source.in_place(entry) if self._source.in_file(entry) else None

    def _for_now(self, entry: PageTensor) -> bool:
        return self._source.in_place(entry) is not None and not self._source.in_file(entry)

    def _beside(self, plan: PagePlan, place: Callable[[PageTensor], StoredRows | None]) -> int:
        """Bytes of what is made ready in a buffer."""
        return sum(aligned(entry.nbytes) for entry in plan.entries if place(entry) is None)

    def _laid_out(
        self,
        plan: PagePlan,
        buffer: Bytes,
        place: Callable[[PageTensor], StoredRows | None],
        pool: Executor | None = None,
    ) -> Page:
        """The page with its entries at their places in the files, and the others in the buffer."""
        places, at, beside = {}, 0, []
        for entry in plan.entries:
            if there := place(entry):
                memory = self._maps[there.file].view(there.offset, there.nbytes)
                self._make_resident(there.file, memory)
                places[entry.offset] = Placed(memory, there.row_bytes)
                continue
            places[entry.offset] = Placed(buffer[at : at + entry.nbytes], 0)
            beside.append([(entry, places[entry.offset].data)])
            at += aligned(entry.nbytes)
        fill(beside, self._source, pool, min(CHUNK, UNDER_WAY // self._threads))
        return Page(plan, buffer, places)
