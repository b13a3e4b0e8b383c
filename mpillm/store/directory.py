"""An open directory. Its files are made, replaced and removed through its handle, even if its path changes.

No symbolic link is followed below the directory, and no file that somebody else has put there is written to: a new
file has a name that cannot be guessed until it is complete and takes the place of the old one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from mpillm.errors import FULL, MpillmError, NoSpace, OutputError, of_system

_TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp")
SYNC_BYTES = 1 << 24  # bytes of one fsync, during which the process handles no signal

D = TypeVar("D", bound="Descriptor")


class Descriptor:
    """An open file descriptor `_file`, closed once: by `close` or at the end of a `with` block."""

    _file: int

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._file

    @property
    def closed(self) -> bool:
        """Whether the descriptor is closed."""
        return self._file < 0

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._file)
            self._file = -1

    def __enter__(self: D) -> D:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Directory(Descriptor):
    """An open directory."""

    def __init__(self, path: Path) -> None:
        """Open an existing directory; OSError if that fails. `path` itself may lead over symbolic links."""
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, name: str, flags: int) -> int:
        """Open a regular file of the directory and return its descriptor; OutputError if it is anything else."""
        try:
            file = os.open(
                name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=self._file
            )
        except OSError as error:
            if error.errno != errno.ELOOP:
                error.filename = str(self.path / name)
                raise
            raise OutputError(
                f"{self.path / name} is a symbolic link, which is not followed; remove it, or give another output."
            ) from None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OutputError(f"{self.path / name} is not a regular file; remove it, or give another output.")
        return file

    def unnamed(self) -> int:
        """Return the descriptor of a new file without a name: nothing is left of it when it is closed."""
        name = f"unnamed.{secrets.token_hex(8)}.tmp"
        file = self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.unlink(name, dir_fd=self._file)
        return file

    def names(self) -> set[str]:
        """Return the names in the directory, without temporary files."""
        return {name for name in os.listdir(self._file) if not _TEMPORARY.fullmatch(name)}

    def remove_temporary_files(self) -> None:
        """Remove temporary files of `replacing` in killed processes; no process may be replacing a file now."""
        for name in filter(_TEMPORARY.fullmatch, os.listdir(self._file)):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._file)

    def holds(self, name: str, file: int) -> bool:
        """Return whether `name` is still the open `file`."""
        try:
            found = os.stat(name, dir_fd=self._file, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(file))

    def is_at_its_path(self) -> bool:
        """Return whether the path still leads to this directory; true if that cannot be determined."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            return error.errno != errno.ESTALE

    def whereabouts(self) -> Path | None:
        """Return the current path of the directory; None if it was deleted, or the system cannot tell (not Linux)."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._file}"))
            return path if os.path.samestat(os.stat(path), os.fstat(self._file)) else None
        except OSError:
            return None

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[io.BufferedRandom]:
        """A file to write: it takes the place of `name` when all is on disk; after an error it is removed."""
        temporary = f"{name}.{secrets.token_hex(8)}.tmp"
        with explained(self.path / name):
            try:
                with open(self.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL), "w+b") as file:
                    with _of_another_file():
                        yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, name, src_dir_fd=self._file, dst_dir_fd=self._file)
                os.fsync(self._file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._file)
                raise


def no_directory(path: Path) -> str:
    """Return what is at a path instead of a directory; "" if it is one, or if nothing is there."""
    if not os.path.lexists(path) or path.is_dir():
        return ""
    return "a file" if path.exists() else "a symbolic link that leads nowhere"


def make(path: Path) -> None:
    """Make a directory if need be; OutputError if that fails."""
    if what := no_directory(path):
        raise OutputError(f"The output {path} is {what}; give a directory.")
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedRandom]:
    """`Directory.replacing` for a single file; OutputError if the path is that of a device or a pipe."""
    with explained(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OutputError(f"{path} is a device or a pipe; give the name of a file.")
        directory = Directory(path.parent)
    with directory, directory.replacing(path.name) as file:
        yield file


@contextlib.contextmanager
def _of_another_file() -> Iterator[None]:
    """Turn an OSError that names a file into the sentence for that one; a failed write to an open file names none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and (known := of_system(error)) is not None:
            raise known from error
        raise


@contextlib.contextmanager
def explained(path: Path, reads: bool = False) -> Iterator[None]:
    """Turn an OSError inside into the sentence for it: a full disk is NoSpace, anything else OutputError.

    `reads` says that the block only reads.
    """
    try:
        yield
    except OSError as error:
        if reads:
            raise OutputError(f"{path} cannot be read: {error.strerror or error}.") from error
        raise explanation(path, error) from error


def explanation(path: Path, error: OSError) -> MpillmError:
    """Return the sentence for a failed write to `path`."""
    if error.errno in FULL:
        return NoSpace(
            f"There is no space left for {path} ({error.strerror}); nothing that was finished is lost: free some "
            "space and run the same command again."
        )
    return OutputError(f"The output {path} cannot be written: {error.strerror or error}.")
