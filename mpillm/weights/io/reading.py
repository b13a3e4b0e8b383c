"""Read files without mapping them: past the page cache where the file system supports that, else through it."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpillm import tracing
from mpillm.errors import ModelError
from mpillm.weights.io.filesystem import madvise

Bytes = NDArray[np.uint8]

SECTOR = 4096  # bytes; alignment of direct I/O, in the file and in memory
REQUESTS = 4  # requests in flight: a disk is busy only while it can choose among several
REQUEST_BYTES = 4 * 2**20
# Bytes of a file that are read at once, wherever they begin: a request has all sectors that it touches.
PORTION = REQUEST_BYTES - 2 * SECTOR
HUGE = 2 * 2**20  # bytes of a huge page, and of a buffer that is worth a call to the system

_threads = threading.local()


class DirectFile:
    """A file that is read past the page cache; its size must not change while it is open."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        self._ordinary = open_file(path, os.O_RDONLY)
        self._direct = open_direct(path)

    def read(self, offset: int, nbytes: int) -> Bytes:
        """Return uint8 [nbytes] from `offset` on, valid until this thread reads again.

        ModelError if they cannot be read or the file has become shorter.
        """
        begin = offset // SECTOR * SECTOR
        end = -(-(offset + nbytes) // SECTOR) * SECTOR
        raw = own_buffer(end - begin)
        if self._direct < 0 or end > self._size or not read_direct(self._direct, begin, raw):
            read_at(self._ordinary, self.path, offset, raw[offset - begin :][:nbytes])
        return raw[offset - begin :][:nbytes]

    def close(self) -> None:
        for descriptor in (self._ordinary, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._ordinary = self._direct = -1


def own_buffer(nbytes: int) -> Bytes:
    """Return this thread's buffer, uint8 [nbytes], valid until the next call.

    It is reused, because new memory costs nearly as much as reading.
    """
    if nbytes > REQUEST_BYTES:
        return new_buffer(nbytes, SECTOR)
    if not hasattr(_threads, "own"):
        _threads.own = new_buffer(REQUEST_BYTES, SECTOR)
    buffer: Bytes = _threads.own[:nbytes]
    return buffer


def new_buffer(nbytes: int, alignment: int) -> Bytes:
    """Return uninitialised memory, uint8 [nbytes], aligned to `alignment` bytes (at most a page).

    Large buffers are mapped, and unmapped with their last view: `malloc` may keep freed memory, and the process would
    exceed its budgets.
    """
    assert mmap.PAGESIZE % alignment == 0, alignment
    if nbytes >= HUGE:
        everything = np.frombuffer(
            mmap.mmap(-1, nbytes + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8
        )
        begin = -everything.ctypes.data % HUGE
        _only_whole(everything, begin, nbytes)
        return everything[begin : begin + nbytes]
    raw = np.empty(nbytes + alignment, np.uint8)
    begin = -raw.ctypes.data % alignment
    return raw[begin : begin + nbytes]


def used_again(dropped: list[Bytes], nbytes: int, alignment: int) -> Bytes:
    """Return a buffer as `new_buffer` does, reusing one of the unused buffers `dropped`; empties that list.

    The system fills new memory with zeros, which takes a third of the time that a fast disk takes to fill it. A large
    buffer can be cut and later be extended to its old size; only the extension is new memory.
    """
    dropped.sort(key=len)
    found = next((old for old in dropped if old.nbytes == nbytes), None)
    if found is None and nbytes >= HUGE:
        found = next((cut for old in dropped if (cut := _cut(old, nbytes)) is not None), None)
    dropped.clear()  # what is not needed goes before anything is added
    return new_buffer(nbytes, alignment) if found is None else found


class EqualBuffers:
    """Buffers of one size that lie side by side in huge pages; those of dropped pages are used again.

    A buffer of its own has a part of a huge page at its end, in pages of 4 KiB. A virtual disk splits requests into so
    many of them: it gave 1.2 GB/s to such memory and 3.4 to huge pages.
    """

    def __init__(self, nbytes: int, count: int) -> None:
        """`count` is the number of buffers that are usually in use at once. Memory is taken as they are used."""
        stride = -(-nbytes // SECTOR) * SECTOR
        whole = -(-count * stride // HUGE) * HUGE if count * stride >= HUGE else count * stride
        slab = new_buffer(whole, SECTOR)
        self.nbytes = nbytes
        self._free = [slab[number * stride :][:nbytes] for number in reversed(range(count))]
        self._lock = threading.Lock()

    def take(self, dropped: list[Bytes]) -> Bytes:
        """Return a buffer, uint8 [nbytes]; empties the list of those that were dropped, which may be longer."""
        with self._lock:
            self._free += [old[: self.nbytes] for old in dropped]
            dropped.clear()
            return self._free.pop() if self._free else new_buffer(self.nbytes, SECTOR)


def _cut(old: Bytes, nbytes: int) -> Bytes | None:
    """Return a large buffer's memory as a buffer of `nbytes`; None if it is too small."""
    everything = old.base
    if not isinstance(everything, np.ndarray) or everything.flags.owndata:
        return None
    begin = old.ctypes.data - everything.ctypes.data
    if begin + nbytes > everything.nbytes:
        return None
    end, old_end = (begin + -(-size // SECTOR) * SECTOR for size in (nbytes, old.nbytes))
    if end < old_end:
        madvise(everything.ctypes.data + end, old_end - end, mmap.MADV_DONTNEED)
    _only_whole(everything, begin, nbytes)
    return everything[begin : begin + nbytes]


def _only_whole(everything: Bytes, begin: int, nbytes: int) -> None:
    """Use huge pages for a buffer except at its end, where one touched byte would occupy a whole huge page."""
    address, whole = everything.ctypes.data + begin, nbytes // HUGE * HUGE
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        madvise(address, whole, mmap.MADV_HUGEPAGE)
        madvise(address + whole, everything.nbytes // SECTOR * SECTOR - begin - whole, mmap.MADV_NOHUGEPAGE)


def open_file(path: Path, flags: int) -> int:
    """Open a file and return its descriptor; ModelError if that fails."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None


def open_direct(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file for direct I/O and return its descriptor; -1 if the file system does not support that (tmpfs)."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1


def read_direct(descriptor: int, offset: int, out: Bytes) -> bool:
    """Fill `out` from `offset` on; False if not all of it was read, and the caller reads through the page cache."""
    try:
        with tracing.span("disk read", bytes=out.nbytes):
            return os.preadv(descriptor, [out.data], offset) == out.nbytes
    except OSError:
        return False


def read_at(descriptor: int, path: Path, offset: int, out: Bytes) -> None:
    """Fill `out` from `offset` on; ModelError if the file cannot be read or has become too short."""
    view = out.data
    done = 0
    while done < len(view):
        try:
            with tracing.span("disk read", bytes=len(view) - done):
                count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise ModelError(f"{path} cannot be read any more: {error.strerror}.") from None
        if count == 0:
            raise changed(path)
        done += count


def read_pieces(descriptor: int, path: Path, offsets: Iterable[int], nbytes: int) -> Bytes:
    """Pieces of a file, each of `nbytes` bytes: uint8 [pieces, nbytes], read-only; errors as of `read_at`."""
    try:
        pieces = [os.pread(descriptor, nbytes, offset) for offset in offsets]
    except OSError as error:
        raise ModelError(f"{path} cannot be read any more: {error.strerror}.") from None
    if any(len(piece) < nbytes for piece in pieces):
        raise changed(path)
    return np.frombuffer(b"".join(pieces), np.uint8).reshape(len(pieces), nbytes)


def changed(path: Path) -> ModelError:
    """Return the error for a file that has changed since it was opened."""
    return ModelError(
        f"{path} was shortened or changed while it was in use; put the model's file back and run the same command "
        "again."
    )
