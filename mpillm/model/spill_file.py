"""The file without a name in which pools of the KV cache lie."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import Interrupted, JobError
from mpillm.weights.io.filesystem import in_memory

Bytes = NDArray[np.uint8]


class SpillFile:
    """A file without a name, which goes with the process. Its space is taken at once: a full disk is known early."""

    def __init__(self, folder: Path, nbytes: int, direct: bool) -> None:
        """Raises JobError if it cannot be had. `direct`: all transfers will be of whole pages, past the page cache."""
        if in_memory(folder):
            raise JobError(
                f"memory.spill_dir = {folder} is in memory; give a directory on a local disk of each node."
            )
        self.folder = folder
        try:
            self._file, name = tempfile.mkstemp(prefix="mpillm-kv-", dir=folder)
            try:
                if direct:
                    self._file = _reopened_direct(self._file, name)
            finally:
                os.unlink(name)
        except OSError as error:
            raise JobError(
                f"memory.spill_dir = {folder}: a file cannot be created there ({error.strerror}); give a "
                "directory on a local disk of each node."
            ) from None
        try:
            os.posix_fallocate(self._file, 0, nbytes)
        except OSError as error:
            os.close(self._file)
            free = shutil.disk_usage(folder).free
            raise JobError(
                f"memory.kv_spill: {nbytes} bytes cannot be allocated in {folder} ({error.strerror}; {free} "
                "bytes are free); lower it, or give another memory.spill_dir."
            ) from None

    def read(self, offset: int, out: Bytes) -> None:
        """Fill `out`; Interrupted if that fails."""
        try:
            count = os.preadv(self._file, [out.data], offset)
        except OSError as error:
            raise self._failed("read", error.strerror) from None
        if count != out.nbytes:
            raise self._failed("read", f"it ended after {offset + count} bytes")

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of `data`; Interrupted if that fails."""
        try:
            count = os.pwritev(self._file, [data.data], offset)
        except OSError as error:
            raise self._failed("written", error.strerror) from None
        if count != data.nbytes:
            raise self._failed("written", "the disk is full")

    def close(self) -> None:
        os.close(self._file)

    def _failed(self, verb: str, why: str | None) -> Interrupted:
        return Interrupted(
            f"The KV cache in {self.folder} could not be {verb} ({why}); finished requests are safe, so run the same "
            "command again, with another memory.spill_dir if that disk is broken."
        )


def _reopened_direct(file: int, name: str) -> int:
    """Return a descriptor that passes the page cache by; the same one where the file system has none such."""
    try:
        direct = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return file
    os.close(file)
    return direct
