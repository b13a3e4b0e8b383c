"""The output directory: who may write to it, and how a file in it is replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType

from mpillm.errors import Interrupted, MpillmError, OutputError

log = logging.getLogger(__name__)

JOURNAL = "journal"
LOCK = "journal.lock"
LOOK = 0.05  # seconds between two looks at a lock
TEMPORARY = ".tmp"  # behind the name of a file that is being written

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Claim:
    """The right to write to an output directory, until closed or until the process ends, however it ends.

    The lock is the kernel's (`flock`, which network file systems turn into a lock at the server), not the lock
    file's existence: a crashed run leaves nothing behind that has to be removed.
    """

    def __init__(self, directory: Path, patience: float = 0.0) -> None:
        """Make the directory if need be; OutputError if it cannot be written, is foreign, or in use by another run.

        `patience` is for how many seconds another run may still have it.
        """
        self.directory = directory
        self.since = datetime.now().astimezone()
        with explained(directory):
            _make(directory)
            self._file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock(patience)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self, patience: float) -> None:
        until = time.monotonic() + patience
        while not self._try_lock():
            if time.monotonic() >= until:
                owner = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "unknown"
                raise OutputError(
                    f"Another run ({owner}) is writing to {self.directory}; wait for its end or give another output."
                )
            time.sleep(LOOK)
        with contextlib.suppress(OSError):  # who holds the lock is good to know, and no more than that
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s has no file locks: a second run on it would not be noticed.", self.directory)
        return True

    def close(self) -> None:
        """Give the directory free."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make(directory: Path) -> None:
    """Make the directory; OutputError if it is something else, or holds what is not ours."""
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"The output {directory} is a file; give a directory.")
    directory.mkdir(parents=True, exist_ok=True)
    names = {entry.name for entry in directory.iterdir()}
    foreign = sorted(name for name in names - {LOCK, JOURNAL + TEMPORARY} if not name.startswith(".nfs"))
    if foreign and JOURNAL not in names:
        raise OutputError(
            f"The output directory {directory} holds {foreign[0]!r} and no journal of a run; "
            "give a new or an empty one."
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedRandom]:
    """A file to write in place of `path`, which becomes it when all has gone well and is on disk, else is removed."""
    temporary = path.with_name(path.name + TEMPORARY)
    with explained(path):
        try:
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sync_directory(directory: Path) -> None:
    """Bring names that were made, replaced or removed in `directory` to disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError inside into the sentence for it: a full disk is Interrupted, anything else OutputError."""
    try:
        yield
    except OSError as error:
        raise explanation(path, error) from error


def explanation(path: Path, error: OSError) -> MpillmError:
    """The sentence for a failed write to `path`."""
    if error.errno in _FULL:
        return Interrupted(
            f"There is no space left for {path} ({error.strerror}); what was finished is safe: "
            "make space and run the same command again."
        )
    return OutputError(f"The output {path} cannot be written: {error.strerror or error}.")
