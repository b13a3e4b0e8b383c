"""How replicas share a job: rank 0 hands out lines and journals what comes back, the other leaders compute.

A leader asks for lines when its scheduler has room for more, and sends the records of its answers after each step.
Rank 0 looks for messages between its own steps. A replica never holds more than its share (by its speed, if that is
known) of all lines that are not answered yet, so that at the end none of them waits while another one has a queue.
"""

from __future__ import annotations

import math
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from typing import Any

import msgspec

from mpillm.batch.requests import make_work, read_line
from mpillm.batch.work import Line, Model
from mpillm.comm.mailbox import Mailbox
from mpillm.engine.limits import Totals
from mpillm.engine.request import PartialCompletion
from mpillm.errors import MpillmError
from mpillm.run.balance import AGAIN, Busy, Teller, failed, watched
from mpillm.run.leader import Given, Leader
from mpillm.run.session import Session
from mpillm.spec import Spec
from mpillm.store.records import PartialResult, Result
from mpillm.weights.identity import ModelChangedError

FEW, MANY = 4, 256  # lines that a leader asks for: at first, and at most
TELL_EVERY = 1.0  # seconds after which a leader tells how far it is, though nothing is finished
LOOK_EVERY = 0.5  # seconds between two looks at other things while nothing is computed
EXACT = 1e-6  # what sums of shares may be off
PARTING = 1.5  # seconds in which leaders must send what they have after an error, before all ranks are ended

AnswerRecord = Result | PartialResult


class Assigned(msgspec.Struct, frozen=True, array_like=True):
    """A line for another replica."""

    line: Line
    content: bytes
    partial: dict[int, PartialCompletion]  # what earlier runs have generated, by choice


class AssignedLines(msgspec.Struct, tag="lines", frozen=True):
    """From rank 0: lines that a leader has asked for."""

    lines: list[Assigned]


class NoMoreLines(msgspec.Struct, tag="stop", frozen=True):
    """From rank 0: no more lines will come. After an error the exit code is not 0, and what is unfinished is saved."""

    exit_code: int


class News(msgspec.Struct, tag="news", frozen=True):
    """From a leader: records since its last message, how far it is, and how many lines it can take."""

    records: list[AnswerRecord]
    totals: Totals
    wanted: int  # 0 if it has asked before


class Left(msgspec.Struct, tag="left", frozen=True):
    """From a leader: its last message."""

    error: bytes  # a pickled MpillmError, or nothing


_FROM_RANK_0 = msgspec.msgpack.Decoder(AssignedLines | NoMoreLines)
_TO_RANK_0 = msgspec.msgpack.Decoder(News | Left | Busy)


class Dispatcher:
    """Rank 0's side: the queue of lines, and what the other leaders hold and have computed."""

    def __init__(
        self,
        session: Session,
        lines: Iterator[Line],
        count: int,
        assigned: Callable[[Line], Assigned],
        keep: Callable[[AnswerRecord], None],
        busy: Callable[[int, Busy], None] | None,
    ) -> None:
        """`count` lines wait to be computed; `keep` takes the records that come from other leaders.

        `busy` takes what ranks tell of their computing, if they do.
        """
        self._mailbox, self._hosts = Mailbox(session.world, session.counters), session.world.hosts
        self._lines, self._waiting = lines, count
        self._assigned, self._keep, self._busy = assigned, keep, busy
        self._leaders = [replica.first for replica in session.replicas]
        shares = session.choice.shares(session.machines, session.chosen)
        self._shares = dict(zip(self._leaders, shares, strict=True))
        self._held = dict.fromkeys(self._leaders, 0)  # lines that are not answered, by leader
        self._wanted = dict.fromkeys(self._leaders[1:], 0)
        self._totals: dict[int, Totals] = {}
        self._here = set(self._leaders[1:])  # who has not sent its last message
        self._telling = set(range(1, session.world.size if busy else 1))  # who tells of its computing

    @property
    def totals(self) -> list[Totals]:
        """Those of the other replicas, as they last told."""
        return list(self._totals.values())

    def take(self) -> Line | None:
        """The next line for rank 0's own replica; None if there is none now."""
        if not self.has_more:
            return None
        self._held[0] += 1
        return self._next()

    def answered_here(self) -> None:
        """Rank 0's own replica has answered a line."""
        self._held[0] -= 1

    @property
    def has_more(self) -> bool:
        """Whether `take` has a line now."""
        return self._room(0) > 0

    @property
    def done(self) -> bool:
        """Whether every line is answered."""
        return not self._waiting and not any(self._held.values())

    def serve(self) -> None:
        """Take what has come from the other leaders, and give them what they have asked for."""
        while (self._here or self._telling) and (message := self._mailbox.receive()) is not None:
            self._take(*message)
        self._give()

    def wait(self) -> None:
        """Serve the next message, or nothing if none comes soon."""
        if (message := self._mailbox.wait(LOOK_EVERY)) is not None:
            self._take(*message)
        self.serve()

    def stop(self, exit_code: int) -> None:
        """Tell the other leaders to stop, and wait until they have; after an error, for PARTING seconds at most."""
        for leader in sorted(self._here):
            self._mailbox.send(msgspec.msgpack.encode(NoMoreLines(exit_code)), leader)
        until = time.monotonic() + PARTING if failed(exit_code) else float("inf")
        while self._here and (left := until - time.monotonic()) > 0:
            if (message := self._mailbox.wait(min(left, LOOK_EVERY))) is not None:
                # The first error is the one to report.
                with suppress(MpillmError) if failed(exit_code) else nullcontext():
                    self._take(*message)

    def part(self) -> None:
        """Wait for the last that ranks tell of their computing, after all engines have stopped without an error."""
        while self._telling:
            if (message := self._mailbox.wait(LOOK_EVERY)) is not None:
                self._take(*message)

    def _take(self, leader: int, data: bytes) -> None:
        message = _TO_RANK_0.decode(data)
        if isinstance(message, Busy):
            if message.last:
                self._telling.discard(leader)
            elif self._busy is not None:
                self._busy(leader, message)
            return
        if isinstance(message, Left):
            self._here.discard(leader)
            if message.error:
                error: MpillmError = pickle.loads(message.error)
                raise type(error)(f"{error} (on rank {leader}, host {self._hosts[leader]})")
            return
        for record in message.records:
            self._keep(record)
            self._held[leader] -= isinstance(record, Result)
        self._totals[leader] = message.totals
        self._wanted[leader] += message.wanted

    def _give(self) -> None:
        for leader, wanted in self._wanted.items():
            if count := min(wanted, self._room(leader)):
                lines = [self._assigned(self._next()) for _ in range(count)]
                self._mailbox.send(msgspec.msgpack.encode(AssignedLines(lines)), leader)
                self._held[leader] += count
                self._wanted[leader] = 0

    def _next(self) -> Line:
        self._waiting -= 1
        return next(self._lines)

    def _room(self, leader: int) -> int:
        """How many of the waiting lines a replica may take now; a slow one does not take the last ones."""
        unanswered, own = self._waiting + sum(self._held.values()), self._shares[leader]
        slow = own * len(self._leaders) < 1 - EXACT
        share = round(unanswered * own) if slow else math.ceil(unanswered * own - EXACT)
        return min(max(share - self._held[leader], 0), self._waiting)


class Assistant:
    """The side of the leader of another replica."""

    def __init__(self, session: Session, spec: Spec, model: Model) -> None:
        """`model` is what rank 0 has checked the lines with."""
        self._session, self._spec, self._model = session, spec, model
        self._mailbox = Mailbox(session.world, session.counters)
        self._records: list[AnswerRecord] = []
        self._leader = Leader(session, spec, model, self._records.append)
        self._lines: deque[Assigned] = deque()
        self._ask, self._asked = FEW, False
        self._told = time.monotonic()
        self._teller = Teller(session) if watched(session) else None
        self._stop: NoMoreLines | None = None

    def run(self) -> int:
        """Compute lines until rank 0 says stop; return its exit code."""
        engine, watch = self._leader.engine, self._session.watch
        try:
            for finished in engine.run(self._leader.requests(self._next), self._more):
                for completion in finished:
                    self._leader.take(completion)
                self._leader.save()
                watch.check()
                self._serve()
                if self._teller is not None:
                    self._teller.tell()
                if self._stop is not None:
                    break
            assert self._stop is not None
            self._part(self._stop.exit_code)
        except MpillmError as error:
            self._part(error.exit_code, error)
            raise
        return self._stop.exit_code

    def _part(self, exit_code: int, error: MpillmError | None = None) -> None:
        """Send what is left, and let the other ranks of this replica stop."""
        keep = exit_code == AGAIN or (exit_code and self._spec.job.checkpoint_tokens)
        if keep and not isinstance(error, ModelChangedError):
            self._leader.save_everything()
        self._tell(0)
        self._mailbox.send(msgspec.msgpack.encode(Left(pickle.dumps(error) if error else b"")), 0)
        self._leader.engine.stop(exit_code)
        self._mailbox.flush(PARTING if failed(exit_code) else float("inf"))
        if self._teller is not None and not failed(exit_code):
            self._teller.end()

    def _next(self) -> Given | None:
        if len(self._lines) <= self._ask // 2 and not self._asked:
            if not self._lines:
                self._ask = min(2 * self._ask, MANY)  # the scheduler takes them faster than they come
            self._asked = True
            self._tell(self._ask)
        if not self._lines:
            return None
        given = self._lines.popleft()
        content = read_line(given.content, self._spec)
        return make_work(given.line, content, self._spec, self._model), given.partial

    def _more(self) -> bool:
        """Wait for a line when nothing is left to do; False if there will be none."""
        self._serve()
        while not self._lines and self._stop is None:
            if (message := self._mailbox.wait(LOOK_EVERY)) is not None:
                self._take(message[1])
        return self._stop is None

    def _serve(self) -> None:
        while (message := self._mailbox.receive()) is not None:
            self._take(message[1])
        if self._records or time.monotonic() > self._told + TELL_EVERY:
            self._tell(0)

    def _take(self, data: bytes) -> None:
        message = _FROM_RANK_0.decode(data)
        if isinstance(message, NoMoreLines):
            self._stop = message
        else:
            self._lines.extend(message.lines)
            self._asked = False

    def _tell(self, wanted: int) -> None:
        news = News(self._records, self._leader.engine.totals, wanted)
        self._mailbox.send(msgspec.msgpack.encode(news), 0)
        self._records.clear()
        self._told = time.monotonic()


def added(totals: Sequence[Totals]) -> Totals:
    """The totals of several replicas together."""
    return Totals(
        **{
            field.name: _together([getattr(one, field.name) for one in totals], field.name)
            for field in fields(Totals)
        }
    )


def _together(values: list[Any], name: str) -> Any:
    if name in ("most_sequences", "most_blocks"):
        return max(values)
    if isinstance(values[0], dict):
        return {key: sum(one.get(key, 0) for one in values) for one in values for key in one}
    return sum(values)
