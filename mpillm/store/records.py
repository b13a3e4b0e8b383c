"""The records of the journal: their content, their layout in the file, and how they are found in a damaged file.

A record is a head of 20 bytes (magic, length of the payload, CRC-32 of place and length, BLAKE2b-64 of place and
payload) and a payload in MessagePack. Both sums include the place (offset and length), so a record
is not valid at another place than where it was written, for instance inside the payload of another one.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from mpillm.batch.names import NumbersByName
from mpillm.batch.work import Line
from mpillm.engine.request import PartialCompletion
from mpillm.words import count_of

VERSION = 2
KEY_BYTES = 8
STATUS_BITS = 16  # bits of the status in a number that also holds an offset
STATUS = (1 << STATUS_BITS) - 1

_MAGIC = b"mpiJ"
HEAD = struct.Struct("<4sIIQ")
_PLACE = struct.Struct("<QI")  # where the head is, length of the payload
_CHUNK = 1 << 20


class JournalHeader(msgspec.Struct, tag="header", frozen=True):
    """The job that the output belongs to: what changes a result, by dotted key (`Spec.identity` and the model)."""

    version: int
    identity: dict[str, Any]
    began: str  # date and time in ISO 8601, with its zone
    written_by: str = ""


class InputKeys(msgspec.Struct, tag="lines", frozen=True):
    """The lines of the input when the run was started: a key of 8 bytes for each."""

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
    key: bytes  # the key of the line
    status: int
    line: bytes
    prompts: list[bytes] = []  # token ids, little-endian int32; the choices of a prompt follow one another
    choices: list[Choice] = []


class PartialResult(msgspec.Struct, tag="part", frozen=True):
    """The tokens of an unfinished choice from token `start` on; earlier records have those before."""

    custom_id: str
    key: bytes  # the key of the line
    choice: int
    start: int
    completion: PartialCompletion = msgspec.field(name="begun")  # as the journals of earlier versions call it


class UsedLayout(msgspec.Struct, tag="layout", frozen=True):
    """The stages and shards that computed the results after this record, and the wire of their sums."""

    stages: int
    shards: int
    wire: Literal["q8_0", "f32"] = "q8_0"

    def __str__(self) -> str:
        return f"{count_of(self.stages, 'stage')} x {count_of(self.shards, 'shard')}"


class Counts(msgspec.Struct, tag="counts", frozen=True):
    """The work of start number `start` of the run so far; the last record of each start is valid."""

    start: int  # from 1
    seconds: float  # seconds of computing
    prompt: int  # tokens
    generated: int
    shared: int  # prompt tokens that were not computed, because other requests share them
    recomputed: int
    left: float | None = None  # estimated seconds until the end of the run


class Verified(msgspec.Struct, tag="sound", frozen=True):
    """All records up to byte `upto` were computed with the model that the header names.

    So were the later ones, if the `state` of the model's files is still this one: then nobody has touched them.
    """

    upto: int
    state: str


class Finished(msgspec.Struct, tag="finished", frozen=True):
    """All lines so far have a result, and the files with the results are written."""

    errors: int  # requests that ended in an error


class Name(msgspec.Struct, frozen=True):
    """The fields of a result that identify it."""

    custom_id: str
    key: bytes
    status: int


class _Named(msgspec.Struct, frozen=True):
    """The request that a record belongs to."""

    custom_id: str


Record = JournalHeader | InputKeys | Result | PartialResult | UsedLayout | Counts | Verified | Finished


def line_key(line: Line) -> bytes:
    """Return the key of a line: a hash of its name and content."""
    return hashlib.blake2b(line.digest + line.custom_id.encode(), digest_size=KEY_BYTES).digest()


class Done:
    """For each finished request, by custom_id: the place of its record, and its status; 16 bytes each."""

    def __init__(self) -> None:
        self._places = NumbersByName()  # offset << STATUS_BITS | status
        self.failed = 0  # the answers whose status is not 200

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, custom_id: object) -> bool:
        return custom_id in self._places

    def add(self, custom_id: str, offset: int, status: int) -> None:
        """Remember the offset of a request's record; the request must have none yet."""
        self._places.add(custom_id, offset << STATUS_BITS | status & STATUS)
        self.failed += status != 200

    def offset(self, custom_id: str) -> int:
        """Return the place of the record of a request; KeyError if there is none."""
        place = self._places.get(custom_id)
        if place is None:
            raise KeyError(custom_id)
        return place >> STATUS_BITS

    def offsets(self) -> Iterator[int]:
        """Return the places of the records, in the order of the file."""
        return (int(place) >> STATUS_BITS for place in self._places.numbers())

    def drop_from(self, offset: int) -> None:
        """Forget the records from an offset on."""
        self._places.drop_from(offset << STATUS_BITS)
        self.failed = int(np.count_nonzero((self._places.numbers() & STATUS) != 200))


@dataclass
class Scan:
    """The content of a journal."""

    header: JournalHeader | None = None
    headers: int = 0  # undamaged copies of it
    keys: bytes | None = None
    done: Done = field(default_factory=Done)
    partial: dict[str, list[int]] = field(default_factory=dict)  # offsets of partial results, by custom_id
    finished: Finished | None = None  # unless something came after it
    verified: Verified | None = None  # the last one
    layout: UsedLayout | None = None  # the layout of the last results
    counts: dict[int, Counts] = field(default_factory=dict)  # by start
    answered: Counter[UsedLayout] = field(default_factory=Counter)  # requests, by layout where it is known
    damage: list[tuple[int, int]] = field(default_factory=list)  # byte ranges that are no records
    end: int = 0  # the end of the last good record


def framed(record: Record, offset: int) -> bytes:
    """Return the bytes of a record that will begin at `offset`."""
    payload = msgspec.msgpack.encode(record)
    place = _PLACE.pack(offset, len(payload))
    return HEAD.pack(_MAGIC, len(payload), zlib.crc32(place), _checksum(place, payload)) + payload


def _checksum(place: bytes, payload: bytes) -> int:
    checksum = hashlib.blake2b(place, digest_size=8)
    checksum.update(payload)
    return int.from_bytes(checksum.digest(), "little")


def payload_at(file: int, offset: int, size: int) -> bytes | None:
    """Return the payload of the record at `offset` in a file of `size` bytes; None if no good record begins there."""
    head = os.pread(file, HEAD.size, offset)
    if len(head) < HEAD.size:
        return None
    magic, length, place_sum, payload_sum = HEAD.unpack(head)
    place = _PLACE.pack(offset, length)
    if magic != _MAGIC or zlib.crc32(place) != place_sum or offset + HEAD.size + length > size:
        return None
    payload = _read(file, offset + HEAD.size, length)
    return payload if len(payload) == length and _checksum(place, payload) == payload_sum else None


def _read(file: int, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`, fewer at the end of the file (one pread gives 2 GiB at most)."""
    parts = []
    while length and (part := os.pread(file, min(length, 1 << 30), offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def scan(file: int, found: Scan | None = None) -> Scan:
    """Read a journal to its end; bytes after its last good record are an unfinished one.

    `found` is the result of an earlier scan of the same journal: this scan continues from it, and changes it.
    """
    found = Scan() if found is None else found
    for offset, payload in good_records(file, found.end):
        if offset > found.end:
            found.damage.append((found.end, offset))
        found.end = offset + HEAD.size + len(payload)
        tag = tag_of(payload)
        if tag not in ("header", "sound"):
            found.finished = None
        if tag == "result":
            name = msgspec.msgpack.decode(payload, type=Name)
            if name.custom_id not in found.done:
                if found.layout is not None:
                    found.answered[found.layout] += 1
                found.done.add(name.custom_id, offset, name.status)
                found.partial.pop(name.custom_id, None)
        elif tag == "part":
            of = msgspec.msgpack.decode(payload, type=_Named)
            if of.custom_id not in found.done:
                found.partial.setdefault(of.custom_id, []).append(offset)
        elif tag == "layout":
            found.layout = msgspec.msgpack.decode(payload, type=UsedLayout)
        elif tag == "counts":
            counts = msgspec.msgpack.decode(payload, type=Counts)
            found.counts[counts.start] = counts
        elif tag == "lines":
            found.keys = msgspec.msgpack.decode(payload, type=InputKeys).keys
        elif tag == "sound":
            found.verified = msgspec.msgpack.decode(payload, type=Verified)
        elif tag == "finished":
            found.finished = msgspec.msgpack.decode(payload, type=Finished)
        elif tag == "header":
            found.header = found.header or msgspec.msgpack.decode(payload, type=JournalHeader)
            found.headers += 1
    return found


def good_records(file: int, begin: int = 0) -> Iterator[tuple[int, bytes]]:
    """Offset and payload of every good record from `begin` on; after damaged bytes the next one is searched for."""
    size = os.fstat(file).st_size
    offset: int | None = begin
    while offset is not None and offset < size:
        payload = payload_at(file, offset, size)
        if payload is None:
            offset = _next_magic(file, offset + 1, size)
        else:
            yield offset, payload
            offset += HEAD.size + len(payload)


def _next_magic(file: int, offset: int, size: int) -> int | None:
    """Return the place of the next record, which may begin at `offset` or later."""
    while offset < size:
        chunk = os.pread(file, _CHUNK + len(_MAGIC) - 1, offset)
        if (at := chunk.find(_MAGIC)) >= 0:
            return offset + at
        offset += _CHUNK
    return None


class _Tag(msgspec.Struct, frozen=True):
    type: str


def tag_of(payload: bytes) -> str:
    """Return the type of a record, by its MessagePack."""
    return msgspec.msgpack.decode(payload, type=_Tag).type
