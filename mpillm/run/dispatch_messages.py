"""The messages between rank 0, which distributes lines, and the leaders of the other replicas, which compute them."""

from __future__ import annotations

import msgspec

from mpillm.batch.work import Line
from mpillm.engine.limits import Totals
from mpillm.engine.request import PartialCompletion
from mpillm.run.balance import Busy
from mpillm.store.records import PartialResult, Result

LOOK_EVERY = 0.5  # seconds between two checks of other things while a rank waits for messages
PARTING = 1.5  # seconds that leaders have after an error to send their records, before all ranks are ended

MANY = 256  # lines in one message to a leader, at most

AnswerRecord = Result | PartialResult


class Assigned(msgspec.Struct, frozen=True, array_like=True):
    """A line that another replica computes."""

    line: Line
    content: bytes
    partial: dict[int, PartialCompletion]  # what earlier runs generated, by choice


class AssignedLines(msgspec.Struct, tag="lines", frozen=True):
    """From rank 0: lines that a leader has asked for, or its first lines."""

    lines: list[Assigned]


class GiveBack(msgspec.Struct, tag="give", frozen=True):
    """From rank 0: a request to return up to `count` lines, those with the fewest generated tokens."""

    count: int


class NoMoreLines(msgspec.Struct, tag="stop", frozen=True):
    """From rank 0: no more lines will come. After an error the exit code is not 0, and unfinished lines are saved."""

    exit_code: int


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """The progress of a leader."""

    steps: int  # the steps so far
    rows: int  # the rows of these steps
    seconds: float  # the seconds in which it had lines to compute
    lines: int  # the lines that it holds
    whole: int  # the rows of these lines, by the lengths of finished answers
    left: int  # the rows of these lines that are not yet computed
    at: float  # the time of the report (time.monotonic() on the leader's host)


class News(msgspec.Struct, tag="news", frozen=True):
    """From a leader: the records since its last message, its progress, and how many lines it asks for."""

    records: list[AnswerRecord]
    totals: Totals
    standing: Standing
    wanted: int  # 0 if an earlier request is not yet answered


class Unfinished(msgspec.Struct, frozen=True, array_like=True):
    """A line that a leader has stopped computing, and what has been generated, by choice."""

    line: Line
    partial: dict[int, PartialCompletion]


class GivenBack(msgspec.Struct, tag="given", frozen=True):
    """From a leader: the lines that it returns, which may be fewer than it was asked for."""

    lines: list[Unfinished]


class Left(msgspec.Struct, tag="left", frozen=True):
    """From a leader: its last message."""

    error: bytes  # a pickled MpillmError, or empty


FROM_RANK_0 = msgspec.msgpack.Decoder(AssignedLines | GiveBack | NoMoreLines)
TO_RANK_0 = msgspec.msgpack.Decoder(News | GivenBack | Left | Busy)
