"""Speculation: a step computes drafts of a sequence's next tokens, and keeps those that are what is drawn.

Draws are keyed by request and position, and rows do not depend on their batch. So the token that is drawn behind a
draft is the one that would have been drawn without it, if the draft is what was drawn before it; at the first one that
is not, the rest is thrown away. Answers have the same bytes, whatever is drafted.

What it costs. A step of R rows takes a + b R seconds. Without drafts it draws R tokens, so a row more pays if it is
right with a probability above b R / (a + b R), the part of a step's time that its rows cost. That part is near 0 while
a step waits for the disk, less than a half where one sequence reads weights from memory, and near 1 in a large batch,
where nothing is drafted. It is estimated from the steps that only decode. If a token of a draft is right with
probability p, the number k of a draft is with p^k. p is estimated for each sequence, for short and for long matches,
also from drafts that are not computed: what is drawn tells whether they were right. So a sequence whose text repeats
nothing costs a few rows until that is known, and none after.

A row of a mixture of experts reads the weights of its experts, so its sequences draft only where the rows of a step go
to nearly all experts anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from mpillm.engine.drafter import Acceptance, Drafted, Drafter
from mpillm.engine.sequence import Sequence

Mode = Literal["auto", "off", "prompt-lookup"]

DRAWN_ROWS = 64  # from which tokens are drawn in a step with drafts, at most
DEAR = 0.8  # the part of a step's time that rows cost, from which on nothing is looked up
CHEAP = 0.02  # and the least that is believed, as where steps wait for the disk
MARGIN = 1.25  # by which a draft must be likelier than it costs: near the border there is little to gain
NEARLY_ALL = 0.9  # of the experts


class RowCost:
    """The part of a step's time that its rows cost, by a weighted least-squares line through the steps so far.

    Until steps with different numbers of rows have been seen, a row costs `first` of a step of one.
    """

    KEPT = 0.95  # what a step leaves of the earlier ones
    WEIGHT = 0.5  # the variance of the rows that `first` counts for

    def __init__(self, first: float) -> None:
        self._first = first
        self._weight = self._rows = self._seconds = self._spread = self._together = (
            0.0  # means, but for the first
        )

    def note(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        self._weight = self._weight * self.KEPT + 1.0
        part = 1.0 / self._weight
        by_rows, by_seconds = rows - self._rows, seconds - self._seconds
        self._rows += part * by_rows
        self._seconds += part * by_seconds
        self._spread = (1.0 - part) * (self._spread + part * by_rows**2)
        self._together = (1.0 - part) * (self._together + part * by_rows * by_seconds)

    def part(self, rows: int) -> float:
        """Of a step of so many rows without drafts."""
        if not self._seconds:
            return self._first * rows / (1.0 + self._first * (rows - 1))
        first = self._first * self._seconds / (1.0 + self._first * (self._rows - 1.0))
        row = (self._together + self.WEIGHT * first) / (self._spread + self.WEIGHT)
        step = self._seconds + row * (rows - self._rows)
        return min(max(row * rows / step, CHEAP), 1.0) if step > 0 else 1.0


class Speculation:
    """What is drafted in the steps of a run, if anything."""

    def __init__(self, mode: Mode, streams: bool, expert_share: float) -> None:
        """`streams`: steps wait for weights; `expert_share`: the part of the experts that a row goes to."""
        self._mode, self._expert_share = mode, expert_share
        self._cost = RowCost(CHEAP if streams else 0.3)
        self._acceptance = Acceptance(0.4), Acceptance(0.8)  # of all sequences, with which each one begins
        self._threshold = 0.0

    def note_step(self, rows: int, seconds: float) -> None:
        """A step of so many rows that only decodes took so long."""
        self._cost.note(rows, seconds)

    def begin_step(self, rows: int) -> bool:
        """Whether anything may be drafted in a step that has so many rows without drafts."""
        if self._mode == "prompt-lookup":
            return True
        self._threshold = min(self._cost.part(rows) * MARGIN, 1.0)
        experts = 1.0 - (1.0 - self._expert_share) ** rows
        return self._threshold <= DEAR and experts >= NEARLY_ALL

    def draft(self, sequence: Sequence, limit: int) -> list[Drafted]:
        """Up to `limit` tokens that may follow the sequence's."""
        if sequence.drafter is None:
            sequence.drafter = Drafter(self._acceptance)
        guess, probable = sequence.drafter.guess(sequence.tokens)
        if self._mode == "auto":
            guess = guess[: int(math.log(self._threshold) / math.log(probable))]
        return list(_drafts(sequence, guess, limit))

    def judge(self, sequence: Sequence) -> None:
        """Learn from what was drawn in a step, whether what had been guessed was computed or not."""
        if sequence.drafter is not None:
            sequence.drafter.judge(sequence.tokens, self._acceptance)


def _drafts(sequence: Sequence, guess: list[int], limit: int) -> Iterator[Drafted]:
    """The tokens of a guess up to one that may not follow; those that a constraint forces take their place."""
    constraint = None
    if sequence.constraint is not None and (guess or sequence.constraint.forced):
        constraint = sequence.constraint.copy()
    for at in range(limit):
        if constraint is not None and constraint.forced:
            token = constraint.forced[0]
            guess = guess if guess[at : at + 1] == [token] else []
        elif at < len(guess):
            token = guess[at]
        else:
            return
        if token in sequence.request.stop_ids:
            return
        if constraint is None:
            yield Drafted(token)
            continue
        if not constraint.accepts(token):
            return
        constraint.push(token)
        if constraint.ended:
            return
        yield Drafted(token, constraint.allowed())
