"""A file that is known to lie on its disk as it was written: each piece is read back from there and compared."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

from mpillm.errors import ModelError
from mpillm.weights.io.filesystem import same_bytes
from mpillm.weights.io.reading import SECTOR, Bytes, open_direct, own_buffer, read_at, read_direct

PIECE = 4 * 2**20  # bytes that are written, and read back, in one go


class VerifiedFile:
    """A new file of `nbytes`, written and read past the page cache where the file system allows that.

    Elsewhere what was written is sent to the disk and dropped from the page cache before it is read back, so that
    it is never the cache that is compared.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # what an earlier run has left, or a link that leads elsewhere
        self._ordinary = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = open_direct(path, os.O_RDWR)
        os.ftruncate(self._ordinary, nbytes)  # writes that lengthen a file wait for one another

    def put(self, data: Bytes, at: int, pool: Executor) -> Iterator[Future[None]]:
        """Write bytes piece by piece; each is a ModelError if it does not lie on the disk then."""
        for begin in range(0, len(data), PIECE):
            yield pool.submit(self.write, data[begin : begin + PIECE], at + begin)

    def write(self, data: Bytes, at: int) -> None:
        """Write up to `PIECE` bytes. ModelError if they do not lie on the disk then."""
        back = own_buffer(len(data))
        aligned = not (len(data) % SECTOR or at % SECTOR or data.ctypes.data % SECTOR)
        if not (aligned and self._direct >= 0 and self._put_direct(data, at, back)):
            write_at(self._ordinary, data, at)
            os.fdatasync(self._ordinary)
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._ordinary, at, len(data), os.POSIX_FADV_DONTNEED)
            read_at(self._ordinary, self.path, at, back)
        if not same_bytes(data.ctypes.data, back.ctypes.data, len(data)):
            raise ModelError(f"{self.path} does not hold what was written to it; pack to another disk.")

    def finish(self) -> None:
        """Have the disk keep it all; an OSError tells of what it could not take."""
        os.fsync(self._ordinary)

    def close(self) -> None:
        for descriptor in (self._ordinary, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._ordinary = self._direct = -1

    def _put_direct(self, data: Bytes, at: int, back: Bytes) -> bool:
        """False if the file system does not do that (as a whole): the ordinary way then works, or says why not."""
        try:
            written = os.pwrite(self._direct, data.data, at)
        except OSError:
            return False
        return written == len(data) and read_direct(self._direct, at, back)


def write_at(descriptor: int, data: Bytes, at: int) -> None:
    """Write all of it, or raise OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:].data, at + done)
