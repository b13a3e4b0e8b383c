"""The common part of loaders of pages: files that must not change, read or mapped in pieces, several at once."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, Protocol

from mpillm import tracing
from mpillm.errors import ModelError
from mpillm.weights.io.filesystem import POPULATE_READ, cached, madvise, map_cached
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.io.reading import REQUEST_BYTES, REQUESTS, Bytes, changed, open_file
from mpillm.weights.page import Page
from mpillm.weights.plan import PagePlan

Kind = Literal["auto", "mmap", "read"]


class StoredFile(Protocol):
    """A file, and its size in bytes when it was opened."""

    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int: ...


class _Watched:
    """A file that must stay as it was: who truncates a file in use would change what is computed."""

    def __init__(self, file: StoredFile) -> None:
        self.path = file.path
        self.descriptor = open_file(file.path, os.O_RDONLY)
        self._first = os.fstat(self.descriptor)
        if self._first.st_size != file.size:
            raise changed(file.path)

    def check(self) -> None:
        """Raise ModelError if the file's size or its time of change is not what it was."""
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._first.st_size, self._first.st_mtime_ns):
            raise changed(self.path)

    def close(self) -> None:
        os.close(self.descriptor)


class ParallelLoader:
    """Loads pages in pieces: up to `parallel` pages at a time, and several pieces of each."""

    def __init__(self, files: Sequence[StoredFile], parallel: int = 2) -> None:
        self.parallel = parallel
        self._files: list[_Watched] = []
        self._pool = ThreadPoolExecutor(REQUESTS, "weights-read")
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            self._files.extend(_Watched(file) for file in files)
            stack.pop_all()

    def renewed(self) -> Iterable[tuple[PagePlan, Page]]:
        """See `Loader.renewed`."""
        return ()

    def close(self) -> None:
        """Let go of the files."""
        self._pool.shutdown()
        for file in self._files:
            file.close()
        self._files.clear()

    def _in_pieces(self, file: _Watched, nbytes: int, fetch: Callable[[int, int], None]) -> None:
        """Call fetch(offset, nbytes) for each piece of `nbytes` bytes of a file; offsets count from the first byte."""
        file.check()
        if nbytes <= REQUEST_BYTES:
            fetch(0, nbytes)  # handing it to another thread would take a fifth of its time
            file.check()
            return
        pieces = [
            self._pool.submit(fetch, begin, min(REQUEST_BYTES, nbytes - begin))
            for begin in range(0, nbytes, REQUEST_BYTES)
        ]
        wait(pieces)
        for piece in pieces:
            piece.result()
        file.check()


class MappingLoader(ParallelLoader):
    """Maps the files whole, and has pages of them in memory."""

    def __init__(self, files: Sequence[StoredFile], parallel: int = 2) -> None:
        super().__init__(files, parallel)
        self._sink = os.memfd_create("mpillm-touched")
        self._maps = [MappedFile(file.path) for file in files]

    def _make_resident(self, number: int, memory: Bytes) -> None:
        """Have all pages in memory: looking at them later then hardly ever waits for the disk, nor fails."""
        file, first = self._files[number], memory.ctypes.data
        address = first // mmap.PAGESIZE * mmap.PAGESIZE
        offset = address - self._maps[number].bytes.ctypes.data

        def fetch(begin: int, nbytes: int) -> None:
            # `cached` and WILLNEED read small pages.
            huge = self._maps[number].is_huge(offset + begin, nbytes)
            there = not huge and cached(file.descriptor, offset + begin, nbytes)
            if there and map_cached(address + begin, nbytes, self._sink):
                return
            try:
                with tracing.span("disk read", bytes=nbytes):
                    if not huge:
                        madvise(address + begin, nbytes, mmap.MADV_WILLNEED)
                    madvise(address + begin, nbytes, POPULATE_READ)
            except OSError as error:
                if error.errno in (errno.ENOMEM, errno.EAGAIN):
                    raise ModelError(
                        f"There is not enough memory to map {file.path} ({error.strerror})."
                    ) from None
                file.check()
                raise ModelError(
                    f"{file.path} cannot be read any more: its disk failed ({error.strerror})."
                ) from None

        self._in_pieces(file, first + memory.nbytes - address, fetch)

    def close(self) -> None:
        super().close()
        for file in getattr(self, "_maps", ()):
            file.close()
        if (sink := getattr(self, "_sink", -1)) >= 0:
            os.close(sink)
            self._sink = -1
