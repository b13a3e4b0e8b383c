"""Where items of a source come from: made kernel-ready, mapped, or read into buffers."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import accumulate
from typing import Literal

from mpillm.errors import JobError, ModelError
from mpillm.weights.fill import fill, load
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.io.filesystem import POPULATE_READ, can_populate, madvise, network_kind
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.io.numa import spread
from mpillm.weights.io.reading import (
    PORTION,
    REQUEST_BYTES,
    REQUESTS,
    Bytes,
    changed,
    new_buffer,
    open_direct,
    open_file,
    read_at,
    read_direct,
    used_again,
)
from mpillm.weights.layer import Layer, Placed
from mpillm.weights.packed.layout import PAGE
from mpillm.weights.packed.source import PackedFile, PackedSource
from mpillm.weights.paging.cache import Heap, Loader
from mpillm.weights.plan import ALIGNMENT, Entry, LayerPlan, aligned
from mpillm.weights.source import Source

Kind = Literal["auto", "mmap", "read"]

UNDER_WAY = 16 * 2**20  # bytes of an unpacked model that all threads together are at


def open_loader(
    source: Source, kind: Kind, threads: int, items: Sequence[LayerPlan], streamed: bool
) -> Loader[Layer]:
    """The loader of some of a source's items, of the given kind; `streamed`: not all of them stay.

    Experts are loaded several at a time, larger items in several pieces.

    "auto" maps what stays, for that costs nothing but reading it once; of an unpacked model, if there are matrices that
    products can take as they lie in its files. What is streamed, it reads past the page cache, which is faster than
    filling that cache and emptying it again; and what comes over a network, always.
    """
    slow_faults = network_kind(source.path) is not None
    small = items[0].expert >= 0
    if isinstance(source, TensorSource):
        mapped = kind != "read" and not streamed and not (slow_faults and kind == "auto") and can_populate()
        if mapped and any(source.in_place(entry) for item in items for entry in item.entries):
            return InPlace(source, REQUESTS if small else 2)
        past_cache = kind == "read" or (kind == "auto" and (streamed or slow_faults))
        return Unpacked(source, threads, items, streamed, past_cache)
    assert isinstance(source, PackedSource)
    if kind == "auto":
        kind = "read" if streamed or slow_faults or not can_populate() else "mmap"
    if kind == "mmap" and not can_populate():
        raise JobError(
            'memory.loader = "mmap" needs Linux 5.14 or newer; leave it "auto", or make it "read".'
        )
    parallel = (
        REQUESTS if small else 2
    )  # the second fills the queue while the first waits for its last pieces
    how = Mapped if kind == "mmap" else Reading
    return how(source.packed_files, parallel)


class Unpacked(Heap[Layer]):
    """Items of an unpacked model, made kernel-ready by threads that all items share.

    Several items are loaded at a time: small ones each by one thread, for handing pieces over takes as long as packing
    them, unless they are read past the page cache, where the disk is to be kept busy.
    """

    def __init__(
        self,
        source: TensorSource,
        threads: int,
        items: Sequence[LayerPlan],
        streamed: bool,
        past_cache: bool,
    ) -> None:
        if past_cache:
            source.read_past_cache()
            workers = REQUESTS
            parallel = REQUESTS if items[0].expert >= 0 else 2
        else:
            # What stays is awaited by the first step, which has nothing else to do.
            workers = parallel = max(threads // 2, 1) if streamed else threads
        self._source = source
        self._chunk = min(UNDER_WAY // workers, PORTION)
        self._small = 0 if past_cache else 4 * self._chunk
        self._pool = ThreadPoolExecutor(workers, "weights-made")
        super().__init__(self._make, parallel)
        self._arena, self._begins = new_buffer(0, ALIGNMENT), dict[str, int]()
        if not streamed:
            # One piece of memory for all: many have a part of a huge page at their end, and small pages take long.
            sizes = [item.nbytes for item in items]
            self._arena = new_buffer(sum(sizes), ALIGNMENT)
            spread(self._arena, threads)
            self._begins = dict(
                zip((item.name for item in items), accumulate(sizes, initial=0), strict=False)
            )

    def room(self, plan: LayerPlan, dropped: list[Bytes]) -> Bytes:
        if not self._begins:
            return super().room(plan, dropped)
        return self._arena[self._begins[plan.name] :][: plan.nbytes]

    def close(self) -> None:
        self._pool.shutdown()

    def _make(self, plan: LayerPlan, buffer: Bytes) -> Layer:
        pool = None if plan.nbytes <= self._small else self._pool
        return load(plan, self._source, buffer, pool, self._chunk)


class _Watched:
    """A file that must stay as it was: who truncates a file in use would change what is computed."""

    def __init__(self, file: PackedFile | MappedFile) -> None:
        self.path = file.path
        self.descriptor = open_file(file.path, os.O_RDONLY)
        self._first = os.fstat(self.descriptor)
        if self._first.st_size != file.size:
            raise changed(file.path)

    def check(self) -> None:
        """ModelError if the file's size or its time of change is not what it was."""
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._first.st_size, self._first.st_mtime_ns):
            raise changed(self.path)

    def close(self) -> None:
        os.close(self.descriptor)


class _Parallel:
    """Loads an item in pieces, several at a time, and so many items."""

    def __init__(self, files: Sequence[PackedFile | MappedFile], parallel: int = 2) -> None:
        self.parallel = parallel
        self._files: list[_Watched] = []
        self._pool = ThreadPoolExecutor(REQUESTS, "weights-read")
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._files.extend(_Watched(file) for file in files)
            stack.pop_all()

    def close(self) -> None:
        """Let go of the files."""
        self._pool.shutdown()
        for file in self._files:
            file.close()
        self._files.clear()

    def _in_pieces(self, file: _Watched, nbytes: int, fetch: Callable[[int, int], None]) -> None:
        """Call fetch(offset, nbytes) for so many bytes of a file, offsets counted from the first of them."""
        file.check()
        pieces = [
            self._pool.submit(fetch, begin, min(REQUEST_BYTES, nbytes - begin))
            for begin in range(0, nbytes, REQUEST_BYTES)
        ]
        wait(pieces)
        for piece in pieces:
            piece.result()
        file.check()


class _Maps(_Parallel):
    """Maps the files whole, and has pages of them in memory."""

    def __init__(self, files: Sequence[PackedFile | MappedFile], parallel: int = 2) -> None:
        super().__init__(files, parallel)
        self._maps = [MappedFile(file.path) for file in files]

    def _have(self, number: int, pages: Bytes) -> None:
        """Have all pages in memory: looking at them later then never waits for the disk, nor fails."""
        file, first = self._files[number], pages.ctypes.data
        address = first // mmap.PAGESIZE * mmap.PAGESIZE

        def fetch(begin: int, nbytes: int) -> None:
            try:
                madvise(address + begin, nbytes, mmap.MADV_WILLNEED)
                madvise(address + begin, nbytes, POPULATE_READ)
            except OSError as error:
                if error.errno in (errno.ENOMEM, errno.EAGAIN):
                    raise ModelError(
                        f"There is no memory left to map {file.path} ({error.strerror})."
                    ) from None
                file.check()
                raise ModelError(
                    f"{file.path} cannot be read any more: its disk failed ({error.strerror})."
                ) from None

        self._in_pieces(file, first + pages.nbytes - address, fetch)

    def close(self) -> None:
        super().close()
        for file in getattr(self, "_maps", ()):
            file.close()


class InPlace(_Maps):
    """Items of an unpacked model that stay: matrices are used where they lie in its files, which ranks of a node share.

    What products cannot take so (vectors, rows in another order, columns of a matrix) is made ready in a buffer beside.
    The files are mapped once more for it, for what is read of them otherwise gives its pages back.
    """

    def __init__(self, source: TensorSource, parallel: int) -> None:
        super().__init__(source.mapped, parallel)
        self._source = source

    def room(self, plan: LayerPlan, dropped: list[Bytes]) -> Bytes:
        return new_buffer(sum(aligned(entry.nbytes) for entry in self._beside(plan)), ALIGNMENT)

    def load(self, plan: LayerPlan, buffer: Bytes) -> Layer:
        places, at = {}, 0
        for entry in self._beside(plan):
            places[entry.offset] = Placed(buffer[at : at + entry.nbytes], 0)
            at += aligned(entry.nbytes)
        fill([[(entry, places[entry.offset].data)] for entry in self._beside(plan)], self._source)
        for entry in plan.entries:
            if there := self._source.in_place(entry):
                pages = self._maps[there.file].view(there.offset, there.nbytes)
                self._have(there.file, pages)
                places[entry.offset] = Placed(pages, there.row_bytes)
        return Layer(plan, buffer, places)

    def give_back(self, plan: LayerPlan) -> None:
        """The maps go when the files are closed: the next run finds the pages where they are."""

    def _beside(self, plan: LayerPlan) -> list[Entry]:
        return [entry for entry in plan.entries if self._source.in_place(entry) is None]


class Mapped(_Maps):
    """Items are the mapped bytes of the files themselves: nothing is copied, and ranks of a node share them."""

    def room(self, plan: LayerPlan, dropped: list[Bytes]) -> Bytes:
        return self._maps[plan.file].view(plan.offset, plan.nbytes)

    def load(self, plan: LayerPlan, buffer: Bytes) -> Layer:
        self._have(plan.file, buffer)
        return Layer(plan, buffer)

    def give_back(self, plan: LayerPlan) -> None:
        """Unmap an item's pages; the system keeps them as long as nobody else needs the memory."""
        buffer = self._maps[plan.file].view(plan.offset, plan.nbytes)
        madvise(buffer.ctypes.data, buffer.nbytes, mmap.MADV_DONTNEED)
        os.posix_fadvise(self._files[plan.file].descriptor, plan.offset, plan.nbytes, os.POSIX_FADV_DONTNEED)


class Reading(_Parallel):
    """Items are read into buffers of their own, past the page cache where the file system allows it."""

    def __init__(self, files: Sequence[PackedFile], parallel: int = 2) -> None:
        super().__init__(files, parallel)
        self._direct = [open_direct(file.path) for file in files]

    def room(self, plan: LayerPlan, dropped: list[Bytes]) -> Bytes:
        return used_again(dropped, plan.nbytes, PAGE)

    def load(self, plan: LayerPlan, buffer: Bytes) -> Layer:
        file, direct = self._files[plan.file], self._direct[plan.file]

        def fetch(begin: int, nbytes: int) -> None:
            out = buffer[begin : begin + nbytes]
            if direct < 0 or not read_direct(direct, plan.offset + begin, out):
                read_at(file.descriptor, file.path, plan.offset + begin, out)

        self._in_pieces(file, plan.nbytes, fetch)
        return Layer(plan, buffer)

    def give_back(self, plan: LayerPlan) -> None:
        """The memory goes with the last view of it."""

    def close(self) -> None:
        super().close()
        for descriptor in getattr(self, "_direct", ()):
            if descriptor >= 0:
                os.close(descriptor)
        self._direct = []
