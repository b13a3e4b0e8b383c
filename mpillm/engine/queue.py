"""The sequences that wait to be admitted, in the order of their requests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import count

from mpillm.engine.blocks import BlockTable
from mpillm.engine.limits import Limits, Totals
from mpillm.engine.request import Request
from mpillm.engine.sequence import Sequence


class NewSequences:
    """Iterates over the sequences of requests that need a step; `take_finished` returns those that need none.

    A request needs none if an earlier run completed it, or if its constraint forces every token.
    """

    def __init__(self, requests: Iterable[Request], totals: Totals) -> None:
        self._requests, self._totals = iter(requests), totals
        self._submitted = time.monotonic()
        self._finished: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        return self

    def __next__(self) -> Sequence:
        while True:
            sequence = Sequence(next(self._requests), self._submitted)
            sequence.append_forced()
            self._totals.count_generated(sequence)
            if sequence.finish_reason is None:
                return sequence
            sequence.started = time.monotonic()
            self._finished.append(sequence)

    def take_finished(self) -> list[Sequence]:
        """Return the sequences that needed no step since the last call."""
        finished, self._finished = self._finished, []
        return finished


class SequenceQueue:
    """Takes sequences from an iterator one by one, so that a job's sequences need not all be in memory.

    Sequences that score different texts after a common prompt (`Request.followed`) are taken together: each is the
    `heir` of the one before it.
    """

    def __init__(self, waiting: Iterator[Sequence], limits: Limits) -> None:
        self._waiting, self._limits = waiting, limits
        self._numbers = count()
        self._inherits = limits.shares and not limits.n_slots
        self._ahead: Sequence | None = None  # taken from the iterator after the first one
        self._first = self._take()

    @property
    def first(self) -> Sequence | None:
        """The next sequence to be admitted, if there is one.

        An iterator that has ended is asked again, because a server may have received another request.
        """
        self._first = self._first or self._take()
        return self._first

    def pop(self) -> None:
        """Remove the first sequence, which has been admitted."""
        self._first = None

    def _take(self) -> Sequence | None:
        sequence, self._ahead = self._ahead or self._take_one(), None
        last = sequence
        while last is not None and self._inherits and last.request.followed:
            following = self._take_one()
            if following is None or not following.goes_on_from(last):
                self._ahead = following
                break
            following.number = last.number
            last.heir = following
            last = following
        return sequence

    def _take_one(self) -> Sequence | None:
        sequence = next(self._waiting, None)
        if sequence is None:
            return None
        assert sequence.request.max_length <= self._limits.max_length, "a job refuses what could never run"
        sequence.number = next(self._numbers)
        sequence.tables = [BlockTable() for _ in self._limits.windows]
        if sequence.outgrows(self._limits.short_length):
            sequence.lengthen()
        return sequence
