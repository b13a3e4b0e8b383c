"""The output directory: which run may write to it, and whether it is still at its path."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

from mpillm.errors import Interrupted, JobError, OutputError
from mpillm.foreign import alike
from mpillm.store.directory import Directory, explained, make

log = logging.getLogger(__name__)

JOURNAL = "journal"
LOCK = "journal.lock"
INPUT = "journal.input"  # the lines that were made of an input of another form
PATIENCE = 0.5  # seconds: `mpillm status` holds the lock for an instant
LOOK = 0.05  # seconds between two looks at a lock

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # errors of file systems without locks


def refuse_no_directory(path: Path) -> None:
    """Raise JobError if there is no directory at `path`, which should be that of a run."""
    if path.is_dir():
        return
    if path.exists():
        raise JobError(f"{path} is a file; give the output directory of a run.")
    raise JobError(
        f"The directory {path} does not exist; {alike(path) or 'give the output directory of a run.'}"
    )


def foreign_names(names: set[str]) -> list[str]:
    """Return the names in a directory without a journal that keep a run from using it."""
    return sorted(name for name in names - {LOCK, INPUT} if not name.startswith(".nfs"))


def try_lock(descriptor: int, path: Path) -> bool:
    """Lock an open file or directory at `path` until it is closed; False if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s has no file locks: a second run on it would not be noticed.", path)
    return True


class Claim:
    """The right of a process to write to an output directory, until `close` or the end of the process.

    The lock is the kernel's (`flock`, which network file systems turn into a lock at the server), not the lock
    file's existence: a crashed run leaves nothing behind that has to be removed. All files are written through
    `directory`, so that another job that has the path meanwhile is never written to.
    """

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        """Make the directory if need be; OutputError if it cannot be written, is foreign, or in use by another run.

        Another process may hold the directory for `patience` more seconds.
        """
        self.path = path
        self.since = datetime.now().astimezone()
        with contextlib.ExitStack() as unless_claimed:
            with explained(path):
                self.directory = unless_claimed.enter_context(_open_directory(path))
                self._lock = self.directory.open(LOCK, os.O_RDWR | os.O_CREAT)
                unless_claimed.callback(os.close, self._lock)
                self._wait_for_lock(patience)
            self.check()
            with explained(path):
                self.directory.remove_temporary_files()
            self._open = unless_claimed.pop_all()

    def check(self) -> None:
        """Raise Interrupted if the directory is no longer at its path, or no longer this run's."""
        if not self.directory.is_at_its_path():
            now = self.directory.whereabouts()
            raise Interrupted(
                f"The output directory {self.path} was moved during the run; its journal is now {now / JOURNAL}: "
                f"move the directory back, or give {now} as the output, and run the command again."
                if now is not None
                else f"The output directory {self.path} was deleted during the run, with the journal; run the "
                "same command again to start over."
            )
        if not self.directory.holds(LOCK, self._lock):
            raise Interrupted(
                f"Files in the output directory {self.path} were deleted during the run ({LOCK} is missing); "
                "run the same command again to continue with what is left of the journal."
            )

    def _wait_for_lock(self, patience: float) -> None:
        until = time.monotonic() + patience
        while not try_lock(self._lock, self.path):
            if time.monotonic() >= until:
                owner = owner_of(self._lock) or "unknown"
                raise OutputError(
                    f"Another run ({owner}) is writing to {self.path}; wait for its end or give another output."
                )
            time.sleep(LOOK)
        if os.fstat(self._lock).st_nlink > 1:  # the lock is a hard link of another file, which stays as it is
            return
        with contextlib.suppress(OSError):  # the owner's name is only for messages
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def close(self) -> None:
        """Give up the directory."""
        self._open.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def owner_of(lock: int) -> str:
    """Return the process named in the open lock file: the last one that claimed the directory."""
    return os.pread(lock, 200, 0).decode(errors="replace").strip()


def _open_directory(path: Path) -> Directory:
    """Make the directory if need be, and open it; OutputError if it is something else, or holds what is not ours."""
    make(path)
    directory = Directory(path)
    names = directory.names()
    foreign = foreign_names(names)
    if foreign and JOURNAL not in names:
        directory.close()
        raise OutputError(
            f"The output directory {path} holds {foreign[0]!r} and no journal of a run; give a new or an "
            "empty directory."
        )
    return directory
