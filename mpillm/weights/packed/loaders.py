"""Load pages of a packed model: the files as they are, mapped or read into buffers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mpillm.errors import JobError
from mpillm.weights.io.filesystem import can_populate, network_kind
from mpillm.weights.io.reading import (
    REQUESTS,
    Bytes,
    open_direct,
    read_at,
    read_direct,
    used_again,
)
from mpillm.weights.packed.layout import PAGE
from mpillm.weights.page import Page
from mpillm.weights.paging.loaders import Kind, MappingLoader, ParallelLoader, StoredFile
from mpillm.weights.paging.pager import Loader
from mpillm.weights.plan import PagePlan


def open_packed_loader(
    path: Path, files: Sequence[StoredFile], kind: Kind, pages: Sequence[PagePlan], streamed: bool
) -> Loader[Page]:
    """Return the loader of some pages of the packed model at `path` (see `Source.open_loader`); JobError if impossible.

    "auto" maps what stays. What is streamed it reads past the page cache, and what comes over a network, always.
    """
    if kind == "auto":
        slow_faults = network_kind(path) is not None
        kind = "read" if streamed or slow_faults or not can_populate() else "mmap"
    if kind == "mmap" and not can_populate():
        raise JobError('memory.loader = "mmap" needs Linux 5.14 or newer; set it to "auto" or "read".')
    # The second of two fills the queue while the first waits for its last pieces.
    parallel = REQUESTS if pages[0].expert >= 0 else 2
    return MappedLoader(files, parallel) if kind == "mmap" else ReadLoader(files, parallel)


class MappedLoader(MappingLoader):
    """Pages are the mapped bytes of the files themselves: nothing is copied, and ranks of a node share them."""

    takes_any_buffer = False

    def allocate(self, plan: PagePlan, dropped: list[Bytes]) -> Bytes:
        return self._maps[plan.file].view(plan.offset, plan.nbytes)

    def load(self, plan: PagePlan, buffer: Bytes) -> Page:
        self._make_resident(plan.file, buffer)
        return Page(plan, buffer)

    def release(self, plan: PagePlan) -> None:
        """Unmap a page's pages; the system keeps them as long as nobody else needs the memory."""
        self._maps[plan.file].release(plan.offset, plan.nbytes)
        os.posix_fadvise(self._files[plan.file].descriptor, plan.offset, plan.nbytes, os.POSIX_FADV_DONTNEED)


class ReadLoader(ParallelLoader):
    """Pages are read into buffers of their own, past the page cache where the file system allows it."""

    takes_any_buffer = True

    def __init__(self, files: Sequence[StoredFile], parallel: int) -> None:
        super().__init__(files, parallel)
        self._direct = [open_direct(file.path) for file in files]

    def allocate(self, plan: PagePlan, dropped: list[Bytes]) -> Bytes:
        return used_again(dropped, plan.nbytes, PAGE)

    def load(self, plan: PagePlan, buffer: Bytes) -> Page:
        file, direct = self._files[plan.file], self._direct[plan.file]

        def fetch(begin: int, nbytes: int) -> None:
            out = buffer[begin : begin + nbytes]
            if direct < 0 or not read_direct(direct, plan.offset + begin, out):
                read_at(file.descriptor, file.path, plan.offset + begin, out)

        self._in_pieces(file, plan.nbytes, fetch)
        return Page(plan, buffer)

    def release(self, plan: PagePlan) -> None:
        """Release a page; its memory is freed with the last view of it."""

    def close(self) -> None:
        super().close()
        for descriptor in getattr(self, "_direct", ()):
            if descriptor >= 0:
                os.close(descriptor)
        self._direct = []
