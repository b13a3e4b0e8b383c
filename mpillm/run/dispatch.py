"""Divides a job over replicas: rank 0 sends lines to the other leaders, and journals the records that they return.

Rank 0 looks for messages between its own steps. A replica never holds more than its share of the unanswered lines,
which is proportional to its speed if that is known. So at the end no replica is idle while another one has a queue. If
a replica is slower than planned, it gives lines back (`sharing`), and others continue them.
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

from mpillm.comm.mailbox import Mailbox
from mpillm.engine.limits import Totals
from mpillm.errors import MpillmError
from mpillm.run.balance import Busy, is_failure
from mpillm.run.dispatch_messages import (
    LOOK_EVERY,
    MANY,
    PARTING,
    TO_RANK_0,
    AnswerRecord,
    Assigned,
    AssignedLines,
    GiveBack,
    GivenBack,
    Left,
    NoMoreLines,
    Unfinished,
)
from mpillm.run.leader import Leader
from mpillm.run.session import Session
from mpillm.run.sharing import Sharing
from mpillm.store.records import Result

EXACT = 1e-6  # the rounding error allowed in sums of shares


class Dispatcher:
    """Rank 0's queue of lines, and the lines and totals of the other leaders."""

    def __init__(
        self,
        session: Session,
        leader: Leader,
        sharing: Sharing,
        lines: Iterator[Unfinished],
        count: int,
        assigned: Callable[[Unfinished], Assigned],
        keep: Callable[[AnswerRecord], None],
        busy: Callable[[int, Busy], None] | None,
        arrived: Callable[[], None],
    ) -> None:
        """`lines` yields the `count` lines to compute; `keep` takes the records of the other leaders.

        `busy` takes the ranks' reports of their computing time, if ranks are compared (`balance`). `arrived` is called
        when more replicas are ready than before.
        """
        self._world, self._mailbox = session.world, Mailbox(session.world, session.counters)
        self._arrivals, self._arrived = session.arrivals, arrived
        self._own, self._lines, self._waiting = leader, lines, count
        self._returned: deque[Unfinished] = deque()  # returned lines are given out before `lines`
        self._assigned, self._keep, self._busy = assigned, keep, busy
        self._leaders = [replica.first for replica in session.replicas]
        self._sharing = sharing
        self._shares = dict(zip(self._leaders, sharing.planned, strict=True))
        self._asked = set[int]()  # leaders that have been asked for lines and have not yet returned them
        self._held = dict.fromkeys(self._leaders, 0)  # unanswered lines, by leader
        # Rank 0's first step loads the weights, so leaders get the lines of their first step before it.
        self._at_once = session.limits.max_sequences * session.limits.micro_batches
        self._wanted = dict.fromkeys(self._leaders[1:], min(self._at_once, MANY))
        self._received = time.monotonic()  # when no further message was there
        self._totals: dict[int, Totals] = {}
        self._here = set(self._leaders[1:])  # leaders that have not sent their last message
        self._telling = set(range(1, session.world.size if busy else 1))  # ranks that still report their time

    @property
    def totals(self) -> list[Totals]:
        """The totals of the other replicas, from their last messages."""
        return list(self._totals.values())

    def take(self) -> Unfinished | None:
        """Return the next line for rank 0's own replica; None if there is none at present."""
        if not self.has_more:
            return None
        self._held[0] += 1
        return self._next()

    def answered_here(self) -> None:
        """Note that rank 0's own replica has answered a line."""
        self._held[0] -= 1

    @property
    def has_more(self) -> bool:
        """Whether `take` would return a line."""
        return self._room(0) > 0

    @property
    def done(self) -> bool:
        """Whether every line is answered."""
        return not self._waiting and not any(self._held.values())

    def serve(self) -> None:
        """Receive the messages of the other leaders, and send them the lines that they have asked for."""
        self._hear()
        while (self._here or self._telling) and (message := self._mailbox.receive()) is not None:
            self._take(*message)
        self._received = time.monotonic()
        self._share_anew()
        self._give()

    def wait(self) -> None:
        """Wait a short time for a message, and serve it."""
        if (message := self._mailbox.wait(LOOK_EVERY)) is not None:
            self._received = time.monotonic()
            self._take(*message)
        self.serve()

    def stop(self, exit_code: int) -> None:
        """Stop the other leaders, and wait until they have; after an error, for at most PARTING seconds."""
        for leader in sorted(self._here):
            self._mailbox.send(msgspec.msgpack.encode(NoMoreLines(exit_code)), leader)
        until = time.monotonic() + PARTING if is_failure(exit_code) else float("inf")
        while self._here and (left := until - time.monotonic()) > 0:
            message = self._mailbox.wait(min(left, LOOK_EVERY))
            # Report the first error, not one that it caused.
            with suppress(MpillmError) if is_failure(exit_code) else nullcontext():
                self._hear()
                if message is not None:
                    self._take(*message)

    def part(self) -> None:
        """Wait for the ranks' last reports of their computing time, after all engines have stopped without an error."""
        while self._telling:
            if (message := self._mailbox.wait(LOOK_EVERY)) is not None:
                self._take(*message)

    def _hear(self) -> None:
        """Note which replicas are ready. Raises the error of one that cannot be."""
        if self._arrivals.complete:
            return
        try:
            if self._arrivals.look():
                self._arrived()
        finally:
            self._here -= self._arrivals.failed

    def _take(self, leader: int, data: bytes) -> None:
        self._hear()  # what a leader has said before
        message = TO_RANK_0.decode(data)
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
                raise type(error)(f"{error}{self._world.where(leader)}")
            return
        if isinstance(message, GivenBack):
            self._asked.discard(leader)
            self._get_back(leader, message.lines)
            return
        for record in message.records:
            self._keep(record)
            self._held[leader] -= isinstance(record, Result)
        self._totals[leader] = message.totals
        self._wanted[leader] += message.wanted
        self._sharing.note(self._leaders.index(leader), message.standing, self._received)

    @property
    def begun(self) -> float:
        """The computed part of the unanswered lines, as a number of lines."""
        return self._sharing.begun(self._own.standing())

    def _share_anew(self) -> None:
        """Change the numbers of lines that replicas hold to match their measured speeds, if it is time."""
        if self._asked or not self._sharing.due:
            return
        standing = self._own.standing()
        self._sharing.note(0, standing, standing.at)
        held = list(self._held.values())
        targets = self._sharing.targets(held, self._waiting)
        if targets is None:
            return
        unanswered = sum(held) + self._waiting
        self._shares = {
            leader: target / unanswered for leader, target in zip(self._leaders, targets, strict=True)
        }
        for leader, own, target in zip(self._leaders, held, targets, strict=True):
            if own <= target:
                # What a leader is to compute at once it gets unasked: its requests wait for the end of rank 0's step.
                if leader:
                    more = min(target, self._at_once) - own
                    self._wanted[leader] = max(self._wanted[leader], min(more, MANY))
            elif leader == 0:
                self._get_back(0, self._own.give_back(own - target))
            else:
                self._asked.add(leader)
                self._mailbox.send(msgspec.msgpack.encode(GiveBack(own - target)), leader)

    def _get_back(self, leader: int, lines: Sequence[Unfinished]) -> None:
        self._held[leader] -= len(lines)
        self._waiting += len(lines)
        self._returned.extend(lines)

    def _give(self) -> None:
        for leader, wanted in self._wanted.items():
            if count := min(wanted, self._room(leader)):
                lines = [self._assigned(self._next()) for _ in range(count)]
                self._mailbox.send(msgspec.msgpack.encode(AssignedLines(lines)), leader)
                self._held[leader] += count
                self._wanted[leader] = 0

    def _next(self) -> Unfinished:
        self._waiting -= 1
        return self._returned.popleft() if self._returned else next(self._lines)

    def _room(self, leader: int) -> int:
        """Return how many of the waiting lines a replica may take; a slow one does not take the last ones."""
        unanswered, own = self._waiting + sum(self._held.values()), self._shares[leader]
        slow = own * len(self._leaders) < 1 - EXACT
        share = round(unanswered * own) if slow else math.ceil(unanswered * own - EXACT)
        share = self._sharing.at_first(self._leaders.index(leader), share)
        return min(max(share - self._held[leader], 0), self._waiting)


def added(totals: Sequence[Totals]) -> Totals:
    """Return the sum of the totals of several replicas."""
    return Totals(
        **{
            field.name: _together([getattr(one, field.name) for one in totals], field.name)
            for field in fields(Totals)
        }
    )


def _together(values: list[Any], name: str) -> Any:
    if name in ("peak_sequences", "peak_blocks"):
        return max(values)
    if isinstance(values[0], dict):
        return {key: sum(one.get(key, 0) for one in values) for one in values for key in one}
    return sum(values)
