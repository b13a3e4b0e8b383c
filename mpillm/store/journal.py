"""The journal: an append-only file of checked records, from which a stopped run goes on and results are made.

A record is a head of 20 bytes (magic, length of the payload, CRC-32 of place and length, BLAKE2b-64 of place and
payload) and a payload in MessagePack. The first record is the header (what job this is), the next one the input's
lines; then come results, in the order in which they were finished, and parts of long answers that are not finished
yet; the layout, wherever what follows was computed on another one; and lines again where the input grew. A record of a
kind that the reader does not know is passed over. The last one says that the results have been written.

Results are brought to disk in groups: not more often than SYNC_EVERY, and so seldom that waiting for the disk stays
under SYNC_SHARE of the time, however slow it is. What a crash finds between two syncs is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from mpillm import __version__
from mpillm.batch.work import Line
from mpillm.engine.sequence import Begun
from mpillm.errors import OutputError
from mpillm.store.output import JOURNAL, Claim, explained, explanation, replacing

log = logging.getLogger(__name__)

VERSION = 2
KEY_BYTES = 8

SYNC_EVERY = 0.1  # seconds
SYNC_SHARE = 0.02

_MAGIC = b"mpiJ"
_HEAD = struct.Struct("<4sIIQ")
_PLACE = struct.Struct("<QI")  # where the head is, length of the payload
_CHUNK = 1 << 20


class Header(msgspec.Struct, tag="header", frozen=True):
    """Which job's output this is: by dotted key, what changes a result (`Spec.identity` and the model's own)."""

    version: int
    identity: dict[str, Any]
    began: str  # date and time in ISO 8601, with its zone
    written_by: str = ""


class Lines(msgspec.Struct, tag="lines", frozen=True):
    """The input's lines as they were at some start of the run: a key of 8 bytes for each."""

    keys: bytes


class Choice(msgspec.Struct, frozen=True, array_like=True):
    """One choice of an answer."""

    finish_reason: str
    values: dict[str, bytes]  # rows of the endpoint's columns, by their group
    seconds_waiting: float
    seconds_running: float


class Result(msgspec.Struct, tag="result", frozen=True):
    """A finished request: its line of results.jsonl, and what results.h5 keeps of it."""

    custom_id: str
    key: bytes  # of its line
    status: int
    line: bytes
    prompts: list[bytes] = []  # token ids, little-endian int32; the choices of a prompt follow one another
    choices: list[Choice] = []


class Part(msgspec.Struct, tag="part", frozen=True):
    """What a choice that was not finished had generated from its token `start` on; the rest lies in parts before."""

    custom_id: str
    key: bytes  # of its line
    choice: int
    start: int
    begun: Begun


class Layout(msgspec.Struct, tag="layout", frozen=True):
    """What follows was computed by so many stages of so many shards."""

    stages: int
    shards: int

    def __str__(self) -> str:
        return f"{self.stages} stage(s) x {self.shards} shard(s)"


class Finished(msgspec.Struct, tag="finished", frozen=True):
    """All lines known so far have their result, and the files with the results are written."""

    errors: int  # requests that ended in one


class _Name(msgspec.Struct, frozen=True):
    """What of a result is needed to know that it is there."""

    custom_id: str
    key: bytes
    status: int


class _Named(msgspec.Struct, frozen=True):
    """Whose a record is."""

    custom_id: str


Record = Header | Lines | Result | Part | Layout | Finished


def line_key(line: Line) -> bytes:
    """The key of a line: of its name and its content."""
    return hashlib.blake2b(line.digest + line.custom_id.encode(), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a finished request's record is, and how the request ended."""

    offset: int
    length: int  # of the payload
    status: int


@dataclass
class _Scan:
    """What a journal holds."""

    header: Header | None = None
    keys: bytes | None = None
    done: dict[str, Place] = field(default_factory=dict)
    done_keys: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, list[int]] = field(default_factory=dict)  # offsets, by custom_id of what is not done
    finished: Finished | None = None  # unless something came after it
    layout: Layout | None = None  # of the last results
    answered: Counter[Layout] = field(default_factory=Counter)  # requests, by layout where it is known
    damage: list[tuple[int, int]] = field(default_factory=list)  # byte ranges that are no records
    end: int = 0  # of the last good record


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
    ) -> None:
        """Open the claimed directory's journal, or begin one; `layout` is that of what will be appended.

        OutputError says what differs if it is another job's, or if a line that it knows is not in the input any more.
        """
        self.path = claim.directory / JOURNAL
        self.damage: list[str] = []
        self.seconds = 0.0  # spent on bringing results to disk
        self._due = 0.0  # when the next group may go, as time.monotonic() says
        self._waiting: list[Result | Part | Layout] = []
        self._layout = layout
        self._parts: dict[str, list[int]] = {}
        keys = b"".join(map(line_key, lines))
        header = Header(VERSION, msgspec.to_builtins(dict(identity)), began(claim).isoformat(), __version__)
        if not self.path.exists():
            with replacing(self.path) as file:
                start = _framed(header, 0)
                file.write(start + _framed(Lines(keys), len(start)))
        with explained(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._resume(header, keys, lines)
        except BaseException:
            self.close()
            raise
        self.resumed = len(self.done)

    def _resume(self, header: Header, keys: bytes, lines: Sequence[Line]) -> None:
        with explained(self.path):
            found = _scan(self._file)
            size = os.fstat(self._file).st_size
        self.done, self._parts = found.done, found.parts
        self.answered, self._last_layout = found.answered, found.layout
        self._end = found.end
        if found.header is None:
            raise OutputError(
                f"The journal {self.path} is damaged at its start; move it away, or give another output, to begin anew."
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
        if found.keys != keys:
            self._write(_framed(Lines(keys), self._end))

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
                told = [("unset" if value is missing else repr(value)) for value in (before, after)]
                raise OutputError(
                    f"The output directory {self.path.parent} belongs to another job: {key} was {told[0]} and is "
                    f"{told[1]}; change it back or give another output."
                )

    def _refuse_changed_lines(self, found: _Scan, keys: bytes, lines: Sequence[Line]) -> None:
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
            data.append(_framed(record, at))
            if isinstance(record, Result):
                places.append((record.custom_id, Place(at, len(data[-1]) - _HEAD.size, record.status)))
            at += len(data[-1])
        begun = time.monotonic()
        self._write(b"".join(data))
        now = time.monotonic()
        self.seconds += now - begun
        self._due = now + max(SYNC_EVERY, (now - begun) * (1 / SYNC_SHARE - 1))
        self.done.update(places)
        self._waiting.clear()
        return len(places)

    def finish(self, errors: int) -> None:
        """Note that the results are written: from now on the run is complete, whatever becomes of its processes."""
        self._write(_framed(Finished(errors), self._end))

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
        """A finished request's record; OutputError if it is not what was written."""
        place = self.done[custom_id]
        with explained(self.path):
            payload = _payload(self._file, place.offset, os.fstat(self._file).st_size)
        if payload is None:
            raise OutputError(
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
                payload = _payload(self._file, offset, size)
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


def began(claim: Claim) -> datetime:
    """When the run that the claimed directory belongs to first began: now, if it has no readable journal yet.

    A chat template that asks for the date is told this one, so that a run which goes on tomorrow gives the same bytes.
    """
    path = claim.directory / JOURNAL
    with explained(path), contextlib.suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            payload = _payload(file, 0, os.fstat(file).st_size)
        finally:
            os.close(file)
        if payload is not None and _tag(payload) == "header":
            return datetime.fromisoformat(msgspec.msgpack.decode(payload, type=Header).began)
    return claim.since


def first_layout(claim: Claim) -> Layout | None:
    """The layout on which the run that the claimed directory belongs to has answered its first requests."""
    path = claim.directory / JOURNAL
    with explained(path), contextlib.suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for _, payload in _good_records(file):
                if (tag := _tag(payload)) == "layout":
                    return msgspec.msgpack.decode(payload, type=Layout)
                if tag not in ("header", "lines"):
                    break
        finally:
            os.close(file)
    return None


def finished(directory: Path) -> Finished | None:
    """How the run in this directory ended; None if it has not come to its end, or its input has grown since."""
    path = directory / JOURNAL
    with explained(path), contextlib.suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _scan(file).finished
        finally:
            os.close(file)
    return None


def _framed(record: Record, offset: int) -> bytes:
    """The bytes of a record that will begin at `offset`."""
    payload = msgspec.msgpack.encode(record)
    place = _PLACE.pack(offset, len(payload))
    return _HEAD.pack(_MAGIC, len(payload), zlib.crc32(place), _checksum(place, payload)) + payload


def _checksum(place: bytes, payload: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(place + payload, digest_size=8).digest(), "little")


def _payload(file: int, offset: int, size: int) -> bytes | None:
    """The payload of the record at `offset` in a file of `size` bytes; None if no good record begins there."""
    head = os.pread(file, _HEAD.size, offset)
    if len(head) < _HEAD.size:
        return None
    magic, length, place_sum, payload_sum = _HEAD.unpack(head)
    place = _PLACE.pack(offset, length)
    if magic != _MAGIC or zlib.crc32(place) != place_sum or offset + _HEAD.size + length > size:
        return None
    payload = _read(file, offset + _HEAD.size, length)
    return payload if len(payload) == length and _checksum(place, payload) == payload_sum else None


def _read(file: int, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, fewer at the end of the file (one pread gives 2 GiB at most)."""
    parts = []
    while length and (part := os.pread(file, min(length, 1 << 30), offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def _scan(file: int) -> _Scan:
    """Read a journal from end to end; what follows its last good record is torn."""
    found = _Scan()
    for offset, payload in _good_records(file):
        if offset > found.end:
            found.damage.append((found.end, offset))
        found.end = offset + _HEAD.size + len(payload)
        tag = _tag(payload)
        found.finished = msgspec.msgpack.decode(payload, type=Finished) if tag == "finished" else None
        if tag == "result":
            name = msgspec.msgpack.decode(payload, type=_Name)
            if name.custom_id not in found.done:
                if found.layout is not None:
                    found.answered[found.layout] += 1
                found.done[name.custom_id] = Place(offset, len(payload), name.status)
                found.done_keys[name.custom_id] = name.key
                found.parts.pop(name.custom_id, None)
        elif tag == "part":
            of = msgspec.msgpack.decode(payload, type=_Named)
            if of.custom_id not in found.done:
                found.parts.setdefault(of.custom_id, []).append(offset)
        elif tag == "layout":
            found.layout = msgspec.msgpack.decode(payload, type=Layout)
        elif tag == "lines":
            found.keys = msgspec.msgpack.decode(payload, type=Lines).keys
        elif tag == "header" and offset == 0:
            found.header = msgspec.msgpack.decode(payload, type=Header)
    return found


def _good_records(file: int) -> Iterator[tuple[int, bytes]]:
    """Offset and payload of every good record, found again behind what is damaged."""
    size = os.fstat(file).st_size
    offset: int | None = 0
    while offset is not None and offset < size:
        payload = _payload(file, offset, size)
        if payload is None:
            offset = _next_magic(file, offset + 1, size)
        else:
            yield offset, payload
            offset += _HEAD.size + len(payload)


def _next_magic(file: int, offset: int, size: int) -> int | None:
    """Where the next record may begin, at `offset` or behind it."""
    while offset < size:
        chunk = os.pread(file, _CHUNK + len(_MAGIC) - 1, offset)
        if (at := chunk.find(_MAGIC)) >= 0:
            return offset + at
        offset += _CHUNK
    return None


class _Tag(msgspec.Struct, frozen=True):
    type: str


def _tag(payload: bytes) -> str:
    return msgspec.msgpack.decode(payload, type=_Tag).type
