"""Bytes of a file without mapping it: past the page cache where the file system allows that, else the ordinary way."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import ModelError
from mpillm.weights.io.filesystem import madvise

Bytes = NDArray[np.uint8]

SECTOR = 4096  # what reading past the page cache is aligned to, in the file and in memory
REQUESTS = 4  # under way at a time: a disk is busy only while it has more than one to choose from
REQUEST_BYTES = 4 * 2**20
PORTION = (
    REQUEST_BYTES - 2 * SECTOR
)  # of a file, wherever it begins: a request has all sectors that it touches
HUGE = 2 * 2**20  # bytes of a huge page, and of a buffer that is worth a call to the system

_threads = threading.local()


class DirectFile:
    """A file that is read past the page cache; it must stay as long as it was when it was opened."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        self._ordinary = open_file(path, os.O_RDONLY)
        self._direct = open_direct(path)

    def read(self, offset: int, nbytes: int) -> Bytes:
        """Bytes that are this thread's until it reads again. ModelError if they cannot be read, or are no more."""
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
    """Bytes that are this thread's until it asks again: new memory costs nearly as much as reading."""
    if nbytes > REQUEST_BYTES:
        return new_buffer(nbytes, SECTOR)
    if not hasattr(_threads, "own"):
        _threads.own = new_buffer(REQUEST_BYTES, SECTOR)
    buffer: Bytes = _threads.own[:nbytes]
    return buffer


def new_buffer(nbytes: int, alignment: int) -> Bytes:
    """Bytes of any values that begin at a multiple of `alignment`, at most a page.

    Large ones come from the system and go back to it with the last view of them: `malloc` may keep what it is given
    back, and a process would hold more than its budgets.
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
    """Bytes as of `new_buffer`, out of buffers that nobody looks at any more; `dropped` is empty afterwards.

    The system fills new memory with zeros, which takes a third of the time that a fast disk takes to fill it. So a
    large buffer may become shorter, and again as long as it was: only what it lacks is new then.
    """
    dropped.sort(key=len)
    found = next((old for old in dropped if old.nbytes == nbytes), None)
    if found is None and nbytes >= HUGE:
        found = next((cut for old in dropped if (cut := _cut(old, nbytes)) is not None), None)
    dropped.clear()  # what is not needed goes before anything is added
    return new_buffer(nbytes, alignment) if found is None else found


def _cut(old: Bytes, nbytes: int) -> Bytes | None:
    """A large buffer's memory, as so many bytes; None if it has not enough."""
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
    """Have whole huge pages in a buffer, but none at its end: what is touched of one takes all of it."""
    address, whole = everything.ctypes.data + begin, nbytes // HUGE * HUGE
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
        madvise(address, whole, mmap.MADV_HUGEPAGE)
        madvise(address + whole, everything.nbytes // SECTOR * SECTOR - begin - whole, mmap.MADV_NOHUGEPAGE)


def open_file(path: Path, flags: int) -> int:
    """A descriptor; ModelError if there is none to be had."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None


def open_direct(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor that goes past the page cache; -1 where the file system has none (tmpfs)."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1


def read_direct(descriptor: int, offset: int, out: Bytes) -> bool:
    """Fill `out`; False if that did not work as a whole: the ordinary way then finds out why, or works."""
    try:
        return os.preadv(descriptor, [out.data], offset) == out.nbytes
    except OSError:
        return False


def read_at(descriptor: int, path: Path, offset: int, out: Bytes) -> None:
    """Fill `out` from a file; ModelError if it cannot be read or has become too short."""
    view = out.data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise ModelError(f"{path} cannot be read any more: {error.strerror}.") from None
        if count == 0:
            raise changed(path)
        done += count


def changed(path: Path) -> ModelError:
    """The sentence for a file that is not what it was when it was opened."""
    return ModelError(
        f"{path} was shortened or changed while it was in use; put the model's file back and run the same command "
        "again."
    )
