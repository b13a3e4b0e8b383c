"""`mpillm status` and `watch` of an output directory, or of one that holds the parts of an array."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

import msgspec

from mpillm.errors import Interrupted, JobError
from mpillm.store import report
from mpillm.store.output import JOURNAL, LOCK, foreign_names
from mpillm.store.results import JSONL
from mpillm.store.status import NotBegun, NothingComputed, Reader, Starting, Status, ago
from mpillm.words import count_of, tokens_of

LOOK = 0.5  # seconds between two looks for a journal


class Parts(msgspec.Struct, kw_only=True, frozen=True):
    """The progress of the parts of an array, of those that have begun."""

    directory: str
    parts: list[Status]
    starting: list[str] = []  # names of parts that have no journal yet
    not_begun: list[str] = []  # of parts that ended before they had one

    @property
    def state(self) -> Literal["running", "stopped", "complete"]:
        """Running if one part is, complete if all are."""
        states = {part.state for part in self.parts}
        if "running" in states or self.starting:
            return "running"
        return "stopped" if "stopped" in states or self.not_begun else "complete"

    @property
    def total(self) -> int:
        """Requests of all parts that have begun."""
        return sum(part.total for part in self.parts)

    @property
    def answered(self) -> int:
        """The answers that are on disk."""
        return sum(part.answered for part in self.parts)

    @property
    def left(self) -> float | None:
        """The seconds until the running parts end; None if one of them does not say."""
        left = [part.left for part in self.parts if part.state == "running"]
        known = [seconds for seconds in left if seconds is not None]
        return max(known) if known and len(known) == len(left) else None

    @property
    def exit_code(self) -> int:
        """75 if a part is not complete, 1 if a request ended in an error, else 0."""
        codes = [part.exit_code for part in self.parts]
        return max([*codes, Interrupted.exit_code] if self.starting or self.not_begun else codes)

    def lines(self) -> Iterator[str]:
        """Yield the status as text: the sums, and the parts that are not complete."""
        complete = sum(part.state == "complete" for part in self.parts)
        begun = len(self.parts) + len(self.starting) + len(self.not_begun)
        yield f"{self.directory}: {count_of(begun, 'run')} begun, {complete} complete"
        share = f" ({100 * self.answered / self.total:.0f} %)" if self.total else ""
        errors = sum(part.errors for part in self.parts)
        yield f"  requests  {self.answered} of {self.total}{share}{f', {errors} with an error' if errors else ''}"
        if any(part.starts for part in self.parts):
            prompts = sum(part.prompt_tokens for part in self.parts)
            generated = sum(part.generated_tokens for part in self.parts)
            yield f"  computed  {tokens_of(prompts, generated)} in {ago(sum(part.seconds for part in self.parts))}"
        for part in self.parts:
            if part.state != "complete":
                far = f"{part.answered} of {part.total} requests, written {ago(part.idle)} ago"
                yield f"  {Path(part.directory).name}  {part.state}: {far}"
        yield from (f"  {name}  starting" for name in self.starting)
        for name in self.not_begun:
            yield f"  {name}  stopped before it computed anything; run its command again"


def outputs_in(directory: Path) -> list[Path]:
    """Return the directories in a directory of which a run has, or had, the lock or a journal, by their names."""
    return sorted(path for path in directory.iterdir() if (path / JOURNAL).exists() or (path / LOCK).exists())


class PartsReader:
    """The directories in a directory that are outputs of runs; a complete one is read once."""

    def __init__(self, path: Path) -> None:
        """NotBegun if there is none."""
        self._path = path
        self._complete = dict[Path, Status]()
        if not outputs_in(path):
            if (path / JSONL).exists():
                if not (path / report.JSON).exists():  # written last
                    raise JobError(f"{path} was made by a merge that did not end; type it again.")
                raise JobError(f"{path} was made by mpillm merge and is complete; type: mpillm report {path}")
            if not any(path.iterdir()):
                raise NotBegun(f"No run has begun in {path} yet: it is empty.")
            raise NotBegun(f"The directory {path} is not the output directory of a run: it has no {JOURNAL}.")

    def look(self) -> Parts:
        """Return the status now; OutputError if a journal cannot be read."""
        parts = list[Status]()
        starting, not_begun = list[str](), list[str]()
        for path in outputs_in(self._path):
            if (now := self._complete.get(path)) is None:
                try:
                    with closing(Reader(path)) as reader:
                        now = reader.look()
                except Starting as now_or_before:
                    ended = isinstance(now_or_before, NothingComputed)
                    (not_begun if ended else starting).append(path.name)
                    continue
            if now.state == "complete":
                self._complete[path] = now
            parts.append(now)
        return Parts(directory=str(self._path), parts=parts, starting=starting, not_begun=not_begun)

    def close(self) -> None:
        """Do nothing: no file is open between two looks."""


def reader_of(path: Path) -> Reader | PartsReader:
    """Return the reader of an output directory, or of one with the parts of an array."""
    try:
        return Reader(path)
    except NotBegun:
        if not path.is_dir():
            raise
    return PartsReader(path)


def when_begun(path: Path, say: Callable[[str], None]) -> Reader | PartsReader:
    """Return the reader of a directory as soon as a run has begun in it; says once that it waits."""
    said = False
    while True:
        try:
            return reader_of(path)
        except (NotBegun, Starting):
            if not said:
                say(_waits(path))
            said = True
            time.sleep(LOOK)


def _waits(path: Path) -> str:
    """Return the sentence on a directory in which no run has started."""
    waits = "waiting for one (Ctrl-C stops waiting)"
    names = foreign_names(set(os.listdir(path))) if path.is_dir() else []
    if held := next((name for name in names if (path / name).is_file()), None):
        return (
            f"No run has started in {path} yet, and only a directory in it can become the output of one, because it "
            f"holds {held!r}; {waits}."
        )
    return f"No run has started in {path} yet; {waits}."


def watch(reader: Reader | PartsReader, every: float, say: Callable[[str], None]) -> None:
    """Say how far a run is, or the parts of an array, every `every` seconds, until none runs any longer."""
    start = time.monotonic()
    first = now = reader.look()
    while now.state == "running":
        spent = time.monotonic() - start
        part = 100 * now.answered / now.total if now.total else 100
        pace = ""
        if now.answered > first.answered:
            rate = (now.answered - first.answered) / spent
            pace = f", {60 * rate:.1f} a minute"
        if now.left is not None:
            pace += f", {ago(now.left)} left"
        say(f"{now.answered} of {count_of(now.total, 'request')} ({part:.0f} %){pace}")
        time.sleep(every)
        now = reader.look()
