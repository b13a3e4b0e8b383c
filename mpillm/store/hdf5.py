"""HDF5 files that grow in bounded memory, on disks that may be full."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mpillm.errors import JobError
from mpillm.store.directory import SYNC_BYTES, Directory

if TYPE_CHECKING:
    import h5py

HELD = 1 << 13  # maximum number of values that a column buffers
HELD_CHARS = 1 << 18  # maximum number of characters that a text column buffers
CHUNKS = 1 << 16  # bytes of the library's cache of chunks; columns only grow, so the last chunks suffice
METADATA = 1 << 20  # bytes of the library's cache of metadata, which would otherwise grow without bound


@contextlib.contextmanager
def new_file(directory: Directory, name: str) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Create an HDF5 file that replaces `name` at the end; yields it, and a function that raises failed writes.

    The file format does not depend on the version of the library.
    """
    with directory.replacing(name) as file:
        import h5py  # here and elsewhere: no run needs it before its end

        guarded = _GuardedFile(file.fileno())
        with h5py.File(guarded, "w", libver=("earliest", "v110"), rdcc_nbytes=CHUNKS) as h5:
            _bound_metadata(h5)
            yield h5, guarded.check
        guarded.check()


@contextlib.contextmanager
def existing_file(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file to read; JobError if that fails."""
    import h5py

    try:
        file = h5py.File(path)
    except OSError as error:
        if error.errno is not None:
            raise JobError(f"{path} cannot be read: {os.strerror(error.errno)}.") from error
        raise JobError(f"{path} is damaged; run the command that made it once more.") from error
    with file:
        yield file


def _bound_metadata(h5: h5py.File) -> None:
    config = h5.id.get_mdc_config()
    config.set_initial_size, config.initial_size = True, METADATA
    config.max_size, config.min_size = METADATA, METADATA // 2
    config.flash_incr_mode = 0  # the cache does not grow for a large entry either
    h5.id.set_mdc_config(config)


class GrowingDataset:
    """A growing one-dimensional dataset of numbers; up to 64 KiB are buffered before they are written."""

    def __init__(self, group: h5py.Group, name: str, dtype: DTypeLike, chunk: int = 1024) -> None:
        self._dataset = _growing(group, name, dtype, chunk)
        self._dtype = np.dtype(dtype)
        self._held = bytearray()
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._held) // self._dtype.itemsize

    def add(self, *values: float) -> None:
        """Append values."""
        self.add_bytes(np.array(values, self._dtype).tobytes())

    def add_bytes(self, values: bytes) -> None:
        """Append values in the dataset's own type."""
        self._held += values
        if len(self._held) >= HELD * self._dtype.itemsize:
            self.flush()

    def flush(self) -> None:
        """Write the buffered values."""
        if self._held:
            _append(self._dataset, np.frombuffer(self._held, self._dtype))
            self._written = len(self._dataset)
            self._held = bytearray()


class TextColumn:
    """A growing one-dimensional dataset of strings, which must not contain zero characters."""

    def __init__(self, group: h5py.Group, name: str) -> None:
        import h5py

        self._dataset = _growing(group, name, h5py.string_dtype(), 1024)
        self._held: list[str] = []
        self._chars = 0

    def add(self, text: str) -> None:
        """Append a string."""
        self._held.append(text)
        self._chars += len(text)
        if len(self._held) >= HELD or self._chars >= HELD_CHARS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered values."""
        if self._held:
            _append(self._dataset, np.array(self._held, object))
            self._held, self._chars = [], 0


class RaggedColumn:
    """Rows of different lengths: all values in one dataset, and the offsets between the rows in another."""

    def __init__(self, group: h5py.Group, values: str, dtype: DTypeLike) -> None:
        self._values = GrowingDataset(group, values, dtype, chunk=8192)
        self._offsets = GrowingDataset(group, "offsets", np.int64)
        self._offsets.add(0)

    def add(self, row: bytes) -> None:
        """Append a row."""
        self._values.add_bytes(row)
        self._offsets.add(len(self._values))

    def flush(self) -> None:
        """Write the buffered values."""
        self._values.flush()
        self._offsets.flush()


def _growing(group: h5py.Group, name: str, dtype: DTypeLike, chunk: int) -> h5py.Dataset:
    return group.create_dataset(
        name, shape=(0,), maxshape=(None,), dtype=dtype, chunks=(chunk,), track_times=False
    )


def _append(dataset: h5py.Dataset, values: NDArray[Any]) -> None:
    length = len(dataset)
    dataset.resize((length + len(values),))
    dataset[length:] = values


class _GuardedFile:
    """A file for the HDF5 library, which crashes if a write to an open file fails.

    So no method of the library raises: after a failed write nothing more is written, and `check` raises the error.
    """

    def __init__(self, file: int) -> None:
        self._file = file  # a descriptor
        self._at = 0
        self._unsynced = 0
        self._error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (os.fstat(self._file).st_size if whence == os.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Read; bytes that could not be written are zeros."""
        buffer[:] = self.read(len(buffer)).ljust(len(buffer), b"\0")
        return len(buffer)

    def read(self, size: int) -> bytes:
        return os.pread(self._file, size, self._at)

    def write(self, data: memoryview) -> int:
        left, at = memoryview(data).cast("B"), self._at
        try:
            while left and self._error is None:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written
                self._unsynced += written
        except OSError as error:
            self._error = error
        return len(data)

    def truncate(self, size: int) -> int:
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            self._error = self._error or error
        return size

    def flush(self) -> None:
        """Do nothing: each write is made at once."""

    def check(self) -> None:
        """Raise the error of a failed write; sync the file if enough was written."""
        if self._error is not None:
            raise self._error
        if self._unsynced >= SYNC_BYTES:
            os.fdatasync(self._file)
            self._unsynced = 0
