"""The messages between rank 0, which hands out lines, and the leaders of the other replicas, which compute them."""

from __future__ import annotations

import msgspec

from mpillm.batch.work import Line
from mpillm.engine.limits import Totals
from mpillm.engine.request import PartialCompletion
from mpillm.run.balance import Busy
from mpillm.store.records import PartialResult, Result

LOOK_EVERY = 0.5  # seconds between two looks at other things while nothing is computed
PARTING = 1.5  # seconds in which leaders must send what they have after an error, before all ranks are ended

MANY = 256  # lines that a leader is given at once, at most

AnswerRecord = Result | PartialResult


class Assigned(msgspec.Struct, frozen=True, array_like=True):
    """A line for another replica."""

    line: Line
    content: bytes
    partial: dict[int, PartialCompletion]  # what earlier runs have generated, by choice


class AssignedLines(msgspec.Struct, tag="lines", frozen=True):
    """From rank 0: lines that a leader has asked for, or its first ones."""

    lines: list[Assigned]


class GiveBack(msgspec.Struct, tag="give", frozen=True):
    """From rank 0: the leader should return up to so many lines, those that are least advanced."""

    count: int


class NoMoreLines(msgspec.Struct, tag="stop", frozen=True):
    """From rank 0: no more lines will come. After an error the exit code is not 0, and what is unfinished is saved."""

    exit_code: int


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """How far a leader is."""

    steps: int  # so far
    rows: int  # of them
    seconds: float  # in which it had anything to do
    lines: int  # that it holds
    whole: int  # rows of them, at most
    left: int  # of these that are still to be computed


class News(msgspec.Struct, tag="news", frozen=True):
    """From a leader: records since its last message, how far it is, and how many lines it can take."""

    records: list[AnswerRecord]
    totals: Totals
    standing: Standing
    wanted: int  # 0 if it has asked before


class Unfinished(msgspec.Struct, frozen=True, array_like=True):
    """A line that a leader computes no further, and what has been generated of it, by choice."""

    line: Line
    partial: dict[int, PartialCompletion]


class GivenBack(msgspec.Struct, tag="given", frozen=True):
    """From a leader: what it returns, which may be less than it was asked for."""

    lines: list[Unfinished]


class Left(msgspec.Struct, tag="left", frozen=True):
    """From a leader: its last message."""

    error: bytes  # a pickled MpillmError, or nothing


FROM_RANK_0 = msgspec.msgpack.Decoder(AssignedLines | GiveBack | NoMoreLines)
TO_RANK_0 = msgspec.msgpack.Decoder(News | GivenBack | Left | Busy)
