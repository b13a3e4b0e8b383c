"""The progress of a run, read from its journal, which stays as it is: during the run, after a stop and at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal

import msgspec

from mpillm.errors import Interrupted, JobError
from mpillm.foreign import alike
from mpillm.store.directory import Directory, explained
from mpillm.store.output import INPUT, JOURNAL, LOCK, NO_LOCKS, owner_of
from mpillm.store.records import KEY_BYTES, JournalHeader, Scan, scan
from mpillm.store.same_job import MODEL_FILE
from mpillm.words import count_of, tokens_of

LAUNCH = "mpillm launch, which starts it again"  # holds the directory between two starts


class Status(msgspec.Struct, kw_only=True, frozen=True):
    """The progress of the run in a directory."""

    directory: str
    state: Literal["running", "stopped", "complete"]
    model: str
    began: str  # date and time in ISO 8601, with its zone
    written_by: str  # version of mpillm
    total: int  # requests of the input
    answered: int  # answers on disk, with errors
    errors: int
    partial: int  # unfinished ones of which some tokens are on disk
    damaged: int  # bytes that are no records
    idle: float  # seconds since the journal was last written to
    starts: int  # starts of the command that have computed something
    seconds: float  # seconds of computing in all starts
    prompt_tokens: int  # prompt tokens of all starts, without shared ones
    generated_tokens: int
    owner: str = ""  # the process that runs it
    left: float | None = None  # seconds until the end, by the last record of a running one

    @property
    def exit_code(self) -> int:
        """0 if the run is complete, 1 if it is and some requests ended in an error, 75 if it is not complete."""
        if self.state != "complete":
            return Interrupted.exit_code
        return 1 if self.errors else 0

    def lines(self) -> Iterator[str]:
        """Yield the status as text."""
        running = f" by {self.owner}" if self.owner else ""
        yield f"{self.directory}: {self.state}{running}"
        yield f"  model     {self.model}"
        yield f"  started   {self.began[:19].replace('T', ' ')}, by mpillm {self.written_by}"
        part = f" ({100 * self.answered / self.total:.0f} %)" if self.total else ""
        errors = f", {self.errors} with an error" if self.errors else ""
        yield f"  requests  {self.answered} of {self.total}{part}{errors}"
        if self.starts:
            starts = f", in {self.starts} starts" if self.starts > 1 else ""
            tokens = tokens_of(self.prompt_tokens, self.generated_tokens)
            yield f"  computed  {tokens} in {ago(self.seconds)}{starts}"
        if self.left is not None:
            yield f"  left      {ago(self.left)}"
        if self.partial:
            yield f"  partial   {count_of(self.partial, 'unfinished request')} with saved tokens"
        if self.damaged:
            yield (
                f"  damage    {count_of(self.damaged, 'byte')} of the journal; the requests in this "
                "part will run again"
            )
        if self.state == "running":
            yield f"  written   {ago(self.idle)} ago"
        elif self.state == "stopped":
            yield f"  written   {ago(self.idle)} ago; run its command again to continue"


def ago(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def _largest_file(header: JournalHeader) -> str:
    """Return the name of the model's largest file."""
    files = {
        name.removeprefix(MODEL_FILE): facts["bytes"]
        for name, facts in header.identity.items()
        if name.startswith(MODEL_FILE)
    }
    return max(files, key=lambda name: files[name], default="?")


class NotBegun(JobError):
    """There is no directory, or no journal in it."""


class Starting(Interrupted):
    """A run has the directory, or had it, and has not written its journal yet."""


class NothingComputed(Starting):
    """A run had the directory, and ended before it wrote its journal."""


class Reader:
    """The journal of a directory, read again and again: each time only what is new."""

    def __init__(self, path: Path) -> None:
        """NotBegun if the directory holds no journal, Starting if a run is about to write one."""
        self._path = path
        self._found = Scan()
        with explained(path, reads=True):
            try:
                self._directory = Directory(path)
            except NotADirectoryError:
                raise JobError(f"{path} is a file; give the output directory of a run.") from None
            except FileNotFoundError:
                meant = alike(path) or "a run creates it when it starts."
                raise NotBegun(f"The directory {path} does not exist; {meant}") from None
        names = self._directory.names()
        if JOURNAL not in names:
            owner = self._owner()
            self._directory.close()
            if owner is not None:
                raise Starting(f"The run in {path} is starting ({owner}); look again in a few seconds.")
            if LOCK in names <= {LOCK, INPUT}:
                raise NothingComputed(
                    f"The run in {path} was stopped before it computed anything; type its command again."
                )
            raise NotBegun(f"The directory {path} is not the output directory of a run: it has no {JOURNAL}.")

    def look(self) -> Status:
        """Return the status now; OutputError if the journal cannot be read."""
        owner = self._owner()
        with explained(self._path / JOURNAL, reads=True):
            file = self._directory.open(JOURNAL, os.O_RDONLY)
            try:
                facts = os.fstat(file)
                # A run that goes on with another model's files, or after damage, cuts the journal.
                again = self._found if facts.st_size >= self._found.end else Scan()
                found = self._found = scan(file, again)
            finally:
                os.close(file)
        if found.header is None:
            raise JobError(
                f"The journal {self._path / JOURNAL} is damaged: it does not say which job it belongs to."
            )
        total, counts = len(found.keys or b"") // KEY_BYTES, list(found.counts.values())
        idle = max(0.0, time.time() - facts.st_mtime)
        left = counts[-1].left if owner is not None and counts else None
        if owner is None and found.finished is None and _is_locked(self._directory.fileno()):
            owner = LAUNCH
        state: Literal["running", "stopped", "complete"] = "complete" if found.finished else "stopped"
        return Status(
            directory=str(self._path),
            state=state if owner is None else "running",
            model=_largest_file(found.header),
            began=found.header.began,
            written_by=found.header.written_by,
            total=total,
            answered=total
            if found.finished
            else len(found.done),  # lines that are no requests count as errors
            errors=found.finished.errors if found.finished else found.done.failed,
            partial=len(found.partial),
            damaged=sum(end - start for start, end in found.damage),
            starts=len(counts),
            seconds=sum(count.seconds for count in counts),
            prompt_tokens=sum(count.prompt - count.shared for count in counts),
            generated_tokens=sum(count.generated for count in counts),
            idle=idle,
            left=left - idle if left is not None and left > idle else None,  # else it is out of date
            owner=owner or "",
        )

    def _owner(self) -> str | None:
        """Return the process that holds the lock of the directory; None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            file = self._directory.open(LOCK, os.O_RDONLY)
            try:
                return (owner_of(file) or "a process") if _is_locked(file) else None
            finally:
                os.close(file)
        return None

    def close(self) -> None:
        """Close the directory."""
        self._directory.close()


def _is_locked(file: int) -> bool:
    """Return whether another process has locked an open file or directory."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in {*NO_LOCKS, errno.EBADF}:
            raise
    return False
