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

A draft model takes time as well: for each token a step of it, which drafts one for all sequences of a step. It is asked
where its drafts are worth more, by its own acceptance, than what the lookups have found. One that does not pay is tried
again now and then.

A row of a mixture of experts reads the weights of its experts, so its sequences draft only where the rows of a step go
to nearly all experts anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Literal

from mpillm.engine.answer_index import LONGEST, AnswerIndex
from mpillm.engine.draft_model import DraftModel
from mpillm.engine.drafter import GRAMMAR, MODEL, Drafted, Drafter, Offer, first_acceptances
from mpillm.engine.sequence import Sequence

Mode = Literal["auto", "off", "prompt-lookup", "always"]

DRAWN_ROWS = 64  # from which tokens are drawn in a step with drafts, at most
DEAR = 0.8  # the part of a step's time that rows cost, from which on nothing is looked up
CHEAP = 0.02  # and the least that is believed, as where steps wait for the disk
MARGIN = 1.25  # by which a draft must be likelier than it costs: near the border there is little to gain
# A draft model that did not pay is tried again after so many steps, for so many tokens.
PATIENCE, PROBED = (
    64,
    2,
)
NEARLY_ALL = 0.9  # of the experts


def may_draft(mode: Mode, windows: Seq[int], slots: int, expert_share: float, rows: int) -> bool:
    """Whether steps of up to `rows` rows can have drafts at all: never if a model keeps no tokens, or keeps states."""
    if mode == "off" or not windows or slots:
        return False
    return mode != "auto" or uses_experts(expert_share, rows)


def uses_experts(share: float, rows: int) -> bool:
    """Whether so many rows, which go to a `share` of the experts each, use nearly all of them."""
    return 1.0 - (1.0 - share) ** rows >= NEARLY_ALL


class RowCost:
    """The part of a step's time that its rows cost, by a weighted least-squares line through the steps so far.

    Until steps with different numbers of rows have been seen, a row costs `first` of a step of one.
    """

    KEPT = 0.95  # what a step leaves of the earlier ones
    WEIGHT = 0.5  # the variance of the rows that `first` counts for
    SLOWEST = 1.5  # times what was expected, at most, is a step noted with: it may have been interrupted

    def __init__(self, first: float) -> None:
        self._first = first
        # The sum of weights, the means of rows and of seconds, and their sums of squares and of products.
        self._weight = self._rows = self._seconds = self._spread = self._together = 0.0

    def note(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if expected := self.seconds(rows):
            seconds = min(seconds, self.SLOWEST * expected)
        self._weight = self._weight * self.KEPT + 1.0
        part = 1.0 / self._weight
        by_rows, by_seconds = rows - self._rows, seconds - self._seconds
        self._rows += part * by_rows
        self._seconds += part * by_seconds
        self._spread = (1.0 - part) * (self._spread + part * by_rows**2)
        self._together = (1.0 - part) * (self._together + part * by_rows * by_seconds)

    def seconds(self, rows: int) -> float:
        """Return the seconds of a step of so many rows; 0 while none was seen."""
        return max(self._seconds + self._row * (rows - self._rows), 0.0) if self._seconds else 0.0

    def part(self, rows: int) -> float:
        """Return the part of a step's time that a row costs, in a step of so many rows without drafts."""
        if not self._seconds:
            return self._first * rows / (1.0 + self._first * (rows - 1))
        step = self.seconds(rows)
        return min(max(self._row * rows / step, CHEAP), 1.0) if step > 0 else 1.0

    @property
    def _row(self) -> float:
        """Seconds of a row."""
        first = self._first * self._seconds / (1.0 + self._first * (self._rows - 1.0))
        return (self._together + self.WEIGHT * first) / (self._spread + self.WEIGHT)


class Speculation:
    """What is drafted in the steps of a run, if anything."""

    def __init__(
        self, mode: Mode, streams: bool, expert_share: float, model: DraftModel | None = None
    ) -> None:
        """`streams`: steps wait for weights; `expert_share`: the part of the experts that a row goes to."""
        self._mode, self._expert_share = mode, expert_share
        self._cost = RowCost(CHEAP if streams else 0.3)
        self._acceptance = first_acceptances()  # of all sequences, with which each one begins
        self._answers = None if mode == "prompt-lookup" else AnswerIndex()
        self._model = None if mode == "prompt-lookup" else model
        self._unasked = 0  # steps since the model was last asked
        self._threshold = 0.0

    def note_step(self, rows: int, seconds: float) -> None:
        """A step of so many rows that only decodes took so long."""
        self._cost.note(rows, seconds)

    def begin(self) -> None:
        """A run begins; what an earlier one has left unfinished is of no use."""
        if self._model is not None:
            self._model.clear()

    def begin_step(self, rows: int) -> bool:
        """Whether anything may be drafted in a step that has so many rows without drafts."""
        if self._mode != "auto":
            return True
        self._threshold = min(self._cost.part(rows) * MARGIN, 1.0)
        return self._threshold <= DEAR and uses_experts(self._expert_share, rows)

    def ask_model(self, sequences: Seq[tuple[Sequence, int]], rows: int) -> None:
        """Have the draft model, if there is one, draft for those whose lookups promise less.

        Each sequence comes with how many drafts it has room for; all together have room for `rows`.
        """
        if self._model is None or len(sequences) > rows:
            return
        step = self._cost.seconds(len(sequences)) if self._mode == "auto" else 0.0
        dearer = min(self._threshold + (MARGIN * self._model.seconds / step if step else 0.0), 1.0)
        self._unasked += 1
        asked: list[tuple[Sequence, int]] = []
        for sequence, capacity in sequences:
            drafter = self._drafter(sequence)
            offer, probable = drafter.guess(sequence.tokens)
            found = min(len(offer.guess.tokens), self._length(self._threshold, probable))
            maximum = self._length(dearer, drafter.of_model)
            if _worth(drafter.of_model, maximum, dearer) <= _worth(probable, found, self._threshold):
                if self._unasked <= PATIENCE:
                    continue
                maximum = PROBED
            if maximum := min(maximum, capacity, rows // len(sequences)):
                asked.append((sequence, maximum))
        if asked:
            self._unasked = 0
            for (sequence, _), drafted in zip(asked, self._model.draft(asked), strict=True):
                if drafted:
                    self._drafter(sequence).take(drafted)

    def draft(self, sequence: Sequence, limit: int) -> list[Drafted]:
        """Up to `limit` tokens that may follow the sequence's."""
        offer, probable = self._drafter(sequence).guess(sequence.tokens)
        if offer.by != MODEL:  # which has drafted no more than pays
            maximum = self._length(self._threshold, probable)
            offer = replace(offer, guess=offer.guess._replace(tokens=offer.guess.tokens[:maximum]))
        return list(_drafts(sequence, offer, limit))

    def judge(self, sequence: Sequence) -> None:
        """Learn from what was drawn in a step, whether what had been guessed was computed or not."""
        if sequence.drafter is not None:
            sequence.drafter.judge(sequence.tokens, self._acceptance)

    def ended(self, sequence: Sequence) -> None:
        """Index the answer of a sequence that is finished, where others look."""
        if self._answers is not None and sequence.generated:
            self._answers.add(sequence.tokens, len(sequence.request.prompt))
        if self._model is not None:
            self._model.forget(sequence)

    def _drafter(self, sequence: Sequence) -> Drafter:
        if sequence.drafter is None:
            sequence.drafter = Drafter(self._acceptance, self._answers)
        return sequence.drafter

    def _length(self, threshold: float, probable: float) -> int:
        """How many drafts are right with more than `threshold`, where each is with `probable` behind others."""
        if self._mode != "auto":
            return LONGEST
        return min(int(math.log(threshold) / math.log(probable)), LONGEST)


def _worth(probable: float, count: int, cost: float) -> float:
    """How many tokens a draft of `count` gains on average, each for so many tokens' time."""
    return probable * (1.0 - probable**count) / (1.0 - probable) - count * cost


def _drafts(sequence: Sequence, offer: Offer, limit: int) -> Iterator[Drafted]:
    """The tokens of an offer up to one that may not follow; those that a constraint forces take their place."""
    guess, constraint = offer.guess.tokens, None
    if sequence.constraint is not None and (guess or sequence.constraint.forced):
        constraint = sequence.constraint.copy()
    for at in range(limit):
        by = offer.by
        if constraint is not None and constraint.forced:
            token, by = constraint.forced[0], GRAMMAR
            guess = guess if guess[at : at + 1] == [token] else []
        elif at < len(guess):
            token = guess[at]
        else:
            return
        if token in sequence.request.stop_ids:
            return
        if constraint is None:
            yield Drafted(token, None, by)
            continue
        if not constraint.accepts(token):
            return
        constraint.push(token)
        if constraint.ended:
            return
        yield Drafted(token, constraint.allowed(), by)
