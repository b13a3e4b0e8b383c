"""The journal: an append-only file of checked records, from which a stopped run goes on and results are made.

The first record is the header (what job this is), the next one the input's lines, and then the header once more, so
that no single damage hides what the results behind it belong to. Then come results, in the order in which they were
finished, and parts of long answers that are not finished yet; the layout, wherever what follows was computed on
another one; and lines again where the input grew. A record of a kind that the reader does not know is passed over. The
last one says that the results have been written.

Results are brought to disk in groups: not more often than SYNC_EVERY, and so seldom that waiting for the disk stays
under SYNC_SHARE of the time, however slow it is. What a crash finds between two syncs is computed again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from mpillm import __version__
from mpillm.batch.work import Line
from mpillm.engine.sequence import Begun
from mpillm.errors import Interrupted, OutputError
from mpillm.store.directory import Directory, explained, explanation
from mpillm.store.output import JOURNAL, Claim
from mpillm.store.records import (
    HEAD,
    KEY_BYTES,
    VERSION,
    Finished,
    Header,
    Layout,
    Lines,
    Part,
    Place,
    Result,
    Scan,
    Sound,
    framed,
    good_records,
    line_key,
    payload_at,
    scan,
    tag_of,
)

log = logging.getLogger(__name__)

SYNC_EVERY = 0.1  # seconds
SYNC_SHARE = 0.02

MODEL_FILE = "model/"  # begins the keys of an identity that are files of the model


class Journal:
    """An open journal. A result counts once `flush` has returned: then it is on disk.

    `done` has what was finished, by custom_id (also in runs before this one); `damage` has a sentence for each
    stretch of the file that a disk or a person has changed: the requests in it are simply run again. `answered` says
    on which layouts earlier runs have answered how many requests.
    """

    def __init__(
        self,
        claim: Claim,
        identity: Mapping[str, Any],
        lines: Sequence[Line],
        layout: Layout | None = None,
        model_state: str = "",
    ) -> None:
        """Open the claimed directory's journal, or begin one; `layout` is that of what will be appended.

        `model_state` says whether the model's files have been touched (`Watch.state`): if it is another one than
        before, what was appended after the last `mark_sound` is dropped.

        OutputError says what differs if it is another job's, or if a line that it knows is not in the input any more.
        """
        self.path = claim.path / JOURNAL
        self._directory = claim.directory
        self.damage: list[str] = []
        self.seconds = 0.0  # spent on bringing results to disk
        self._due = 0.0  # when the next group may go, as time.monotonic() says
        self._waiting: list[Result | Part | Layout | Sound] = []
        self._layout, self._state = layout, model_state
        self._parts: dict[str, list[int]] = {}
        keys = b"".join(map(line_key, lines))
        header = Header(VERSION, msgspec.to_builtins(dict(identity)), began(claim).isoformat(), __version__)
        if JOURNAL not in self._directory.names():
            with self._directory.replacing(JOURNAL) as file:
                start = framed(header, 0)
                start += framed(Lines(keys), len(start))
                start += framed(Sound(len(start), model_state), len(start))
                file.write(start + framed(header, len(start)))
        with explained(self.path):
            self._file = self._directory.open(JOURNAL, os.O_RDWR)
        try:
            self._resume(header, keys, lines)
        except BaseException:
            self.close()
            raise
        self.resumed = len(self.done)

    def _resume(self, header: Header, keys: bytes, lines: Sequence[Line]) -> None:
        with explained(self.path):
            found = self._scan_sound()
            size = os.fstat(self._file).st_size
        self.done, self._parts = found.done, found.parts
        self.answered, self._last_layout = found.answered, found.layout
        self._end = found.end
        if found.header is None:
            raise OutputError(
                f"The journal {self.path} is damaged: nothing in it says which job it is of; "
                "move it away, or give another output, to begin anew."
            )
        for start, end in found.damage:
            self.damage.append(
                f"The journal {self.path} is damaged in bytes {start} to {end}; the requests in it run again."
            )
        self._refuse_other_job(found.header, header)
        self._refuse_changed_lines(found, keys, lines)
        if size > self._end:
            log.info(
                "The journal's last record was not finished (%d bytes); it is dropped.", size - self._end
            )
            with explained(self.path):
                os.ftruncate(self._file, self._end)
        if found.headers < 2:  # one of the two was damaged
            self._write(framed(found.header, self._end))
        if found.keys != keys:
            self._write(framed(Lines(keys), self._end))
        self._unmarked = 0  # good looks that it takes until all that was appended is known to be sound
        self._looked = self._end  # where the journal ended at the last good look at the model
        self._sound = self._end  # up to where all is known to be sound
        if found.sound is None or found.sound.state != self._state:
            self._write(framed(Sound(self._end, self._state), self._end))

    def _scan_sound(self) -> Scan:
        """What the journal holds, without what may have been computed with other files of the model."""
        found = scan(self._file)
        if found.header is None or found.sound is None or found.sound.state == self._state:
            return found
        before = len(found.done)
        os.ftruncate(self._file, found.sound.upto)
        found = scan(self._file)
        if dropped := before - len(found.done):
            self.damage.append(
                f"The model's files were touched, or are other copies, since the journal {self.path} was written: "
                f"the last {dropped} request(s) run again."
            )
        return found

    def mark_sound(self, closely: bool = False) -> None:
        """The model's files are what they were. With `closely`, all ranks have looked, and so all is sound up to here.

        Else each rank looks for itself, and what counts is what was there at the look before.
        """
        self._sound, self._looked = self._end if closely else self._looked, self._end
        if self._unmarked:
            self._waiting.append(Sound(self._sound, self._state))
            self._unmarked -= 1

    def drop_unsound(self) -> None:
        """The model's files have changed: what was appended since the last good look is dropped."""
        self._waiting.clear()
        with explained(self.path):
            os.ftruncate(self._file, self._sound)
        self._end = self._sound
        self._write(framed(Sound(self._end, self._state), self._end))
        self.done = {name: place for name, place in self.done.items() if place.offset < self._sound}

    def _refuse_other_job(self, was: Header, now: Header) -> None:
        if was.version != VERSION:
            raise OutputError(
                f"The journal {self.path} is of format {was.version} (mpillm {was.written_by}) and this mpillm knows "
                f"format {VERSION}; give another output."
            )
        missing = object()
        for key in {**was.identity, **now.identity}:
            before, after = was.identity.get(key, missing), now.identity.get(key, missing)
            if before != after:
                if key.startswith(MODEL_FILE):
                    raise OutputError(self._other_model(key.removeprefix(MODEL_FILE), before, after))
                told = [("unset" if value is missing else repr(value)) for value in (before, after)]
                raise OutputError(
                    f"The output directory {self.path.parent} belongs to another job: {key} was {told[0]} and is "
                    f"{told[1]}; change it back or give another output."
                )

    def _other_model(self, name: str, before: object, after: object) -> str:
        said = f"The output directory {self.path.parent} belongs to another job: the model's file {name} "
        if not isinstance(before, dict) or not isinstance(after, dict):
            return f"{said}is {'new' if isinstance(after, dict) else 'gone'}; change it back or give another output."
        if before["hash"] != after["hash"] or before["bytes"] != after["bytes"]:
            return f"{said}has changed; change it back or give another output."
        return (
            f"{said}was modified since, though its size and samples of it are the same. If it is the same file, say so "
            f"with touch -d @{before['modified']} {name}; else give another output."
        )

    def _refuse_changed_lines(self, found: Scan, keys: bytes, lines: Sequence[Line]) -> None:
        """Lines may be added anywhere; one that was there must still be there as it was."""
        old = found.keys or b""
        if keys.startswith(old) and not found.damage:
            return
        now = {keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)}
        what = "the input has changed since it was begun"
        for name, key in found.done_keys.items():
            if key not in now:
                raise OutputError(
                    self._changed(f"{what}: the line of {name!r}, which is done, is changed or gone")
                )
        for index in range(len(old) // KEY_BYTES):
            if old[index * KEY_BYTES : (index + 1) * KEY_BYTES] not in now:
                name = f" (now {lines[index].custom_id!r})" if index < len(lines) else ""
                raise OutputError(self._changed(f"{what}: its request {index + 1}{name} is changed or gone"))

    def _changed(self, what: str) -> str:
        begin = f"The output directory {self.path.parent} belongs to another job"
        return f"{begin}: {what}; restore it or give another output."

    def append(self, record: Result | Part) -> None:
        """Take a finished request, or a part of one; it is on disk after the next `flush`."""
        if self._layout is not None and self._layout != self._last_layout:
            self._waiting.append(self._layout)
            self._last_layout = self._layout
        self._waiting.append(record)
        self._unmarked = 2

    def commit(self) -> int:
        """`flush`, if it is time again; call it often."""
        return self.flush() if time.monotonic() >= self._due else 0

    def flush(self) -> int:
        """Bring what was appended to disk, all in one go, and return how many requests that finished.

        Interrupted if the disk is full: what waited still waits, and a later flush may go well.
        """
        if not self._waiting:
            return 0
        data, places, at = [], [], self._end
        for record in self._waiting:
            data.append(framed(record, at))
            if isinstance(record, Result):
                places.append((record.custom_id, Place(at, len(data[-1]) - HEAD.size, record.status)))
            at += len(data[-1])
        begun = time.monotonic()
        self._write(b"".join(data))
        now = time.monotonic()
        self.seconds += now - begun
        self._due = now + max(SYNC_EVERY, (now - begun) * (1 / SYNC_SHARE - 1))
        self.done.update(places)
        self._waiting.clear()
        return len(places)

    def check(self) -> None:
        """Interrupted if the journal is no longer the file of its name; call it every so often."""
        if not self._directory.holds(JOURNAL, self._file):
            raise Interrupted(
                f"The journal {self.path} was deleted or replaced during the run; put it back and run the same "
                "command again, which begins anew without it."
            )

    def finish(self, errors: int) -> None:
        """Note that the results are written: from now on the run is complete, whatever becomes of its processes."""
        self._write(framed(Finished(errors), self._end))

    def _write(self, data: bytes) -> None:
        """Write at the end, to disk; after a failure the file ends where it did."""
        try:
            view, at = memoryview(data), self._end
            while view:
                written = os.pwrite(self._file, view, at)
                view, at = view[written:], at + written
            os.fdatasync(self._file)
        except OSError as error:
            self._cut()
            raise explanation(self.path, error) from error
        self._end += len(data)

    def _cut(self) -> None:
        try:
            os.ftruncate(self._file, self._end)
        except OSError as error:  # then the next start drops it
            log.warning("The unfinished end of %s stays for now: %s.", self.path, error.strerror)

    def read(self, custom_id: str) -> Result:
        """A finished request's record; Interrupted if it is not what was written: the next run answers it again."""
        place = self.done[custom_id]
        with explained(self.path):
            payload = payload_at(self._file, place.offset, os.fstat(self._file).st_size)
        if payload is None:
            raise Interrupted(
                f"The journal {self.path} is damaged at byte {place.offset} (custom_id {custom_id!r}); "
                "run the same command again."
            )
        return msgspec.msgpack.decode(payload, type=Result)

    def begun(self, line: Line) -> dict[int, Begun]:
        """What runs before this one have generated of a line that they did not finish, by choice; gives it once."""
        found: dict[int, Begun] = {}
        with explained(self.path):
            size = os.fstat(self._file).st_size
            for offset in self._parts.pop(line.custom_id, ()):
                payload = payload_at(self._file, offset, size)
                part = msgspec.msgpack.decode(payload, type=Part) if payload is not None else None
                if part is not None and part.key == line_key(line):
                    before = found.get(part.choice, Begun(tokens=[]))
                    found[part.choice] = before.continued(part.start, part.begun)
        return {choice: begun for choice, begun in found.items() if begun.tokens}

    def close(self) -> None:
        """Close the file; what was not flushed is lost."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _opened(directory: Directory) -> Iterator[int | None]:
    """The directory's journal, for reading; None if there is none yet."""
    with explained(directory.path / JOURNAL):
        try:
            file = directory.open(JOURNAL, os.O_RDONLY)
        except FileNotFoundError:
            yield None
            return
        try:
            yield file
        finally:
            os.close(file)


def began(claim: Claim) -> datetime:
    """When the run that the claimed directory belongs to first began: now, if it has no readable journal yet.

    A chat template that asks for the date is told this one, so that a run which goes on tomorrow gives the same bytes.
    """
    with _opened(claim.directory) as file:
        for _, payload in good_records(file) if file is not None else ():
            if tag_of(payload) == "header":
                return datetime.fromisoformat(msgspec.msgpack.decode(payload, type=Header).began)
    return claim.since


def first_layout(claim: Claim) -> Layout | None:
    """The layout on which the run that the claimed directory belongs to has answered its first requests."""
    with _opened(claim.directory) as file:
        for _, payload in good_records(file) if file is not None else ():
            if (tag := tag_of(payload)) == "layout":
                return msgspec.msgpack.decode(payload, type=Layout)
            if tag in ("result", "part"):
                break
    return None


def finished(path: Path) -> Finished | None:
    """How the run in this directory ended; None if it has not come to its end, or its input has grown since."""
    with explained(path):
        try:
            directory = Directory(path)
        except FileNotFoundError:
            return None
    with directory, _opened(directory) as file:
        return scan(file).finished if file is not None else None
