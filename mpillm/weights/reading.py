"""Bytes of a file without mapping it: past the page cache where the file system allows that, else the ordinary way."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError

Bytes = NDArray[np.uint8]

SECTOR = 4096  # what reading past the page cache is aligned to, in the file and in memory
REQUESTS = 4  # under way at a time: a disk is busy only while it has more than one to choose from
REQUEST_BYTES = 4 * 2**20
HUGE = 2 * 2**20  # bytes of a huge page, and of a buffer that is worth a call to the system


class DirectFile:
    """A file that is read past the page cache; it must stay as long as it was when it was opened."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        self._ordinary = open_file(path, os.O_RDONLY)
        self._direct = open_direct(path)

    def read(self, offset: int, nbytes: int) -> Bytes:
        """Bytes in memory of their own. ModelError if they cannot be read, or are there no more."""
        begin = offset // SECTOR * SECTOR
        end = -(-(offset + nbytes) // SECTOR) * SECTOR
        raw = new_buffer(end - begin, SECTOR)
        if self._direct < 0 or end > self._size or not read_direct(self._direct, begin, raw):
            read_at(self._ordinary, self.path, offset, raw[offset - begin :][:nbytes])
        return raw[offset - begin :][:nbytes]

    def close(self) -> None:
        for descriptor in (self._ordinary, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._ordinary = self._direct = -1


def new_buffer(nbytes: int, alignment: int) -> Bytes:
    """Bytes of any values that begin at a multiple of `alignment`, at most a page.

    Large ones come from the system and go back to it with the last view of them: `malloc` may keep what it is given
    back, and a process would hold more than its budgets.
    """
    assert mmap.PAGESIZE % alignment == 0, alignment
    if nbytes >= HUGE:
        memory = mmap.mmap(-1, nbytes + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        everything = np.frombuffer(memory, np.uint8)
        begin = -everything.ctypes.data % HUGE
        with contextlib.suppress(AttributeError, OSError):  # a system without huge pages
            # Only whole ones: what is touched of the last one would take all of it.
            memory.madvise(mmap.MADV_HUGEPAGE, begin, nbytes // HUGE * HUGE)
        return everything[begin : begin + nbytes]
    raw = np.empty(nbytes + alignment, np.uint8)
    begin = -raw.ctypes.data % alignment
    return raw[begin : begin + nbytes]


def open_file(path: Path, flags: int) -> int:
    """A descriptor; ModelError if there is none to be had."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None


def open_direct(path: Path) -> int:
    """A descriptor that reads past the page cache; -1 where the file system has none (tmpfs)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
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
