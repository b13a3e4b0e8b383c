"""Speculative decoding: a step computes drafts of a sequence's next tokens, and keeps those that equal the draws.

Random numbers depend on request and position only, and rows do not depend on their batch. So the token drawn after a
draft is the one that would have been drawn without speculation, if the draft equals the token drawn in its place. The
drafts after the first wrong one are discarded. Answers have the same bytes with any drafts.

Cost: a step of R rows takes a + b R seconds. Without drafts it draws R tokens, so one more row pays if its draft is
right with a probability above b R / (a + b R), the share of the rows in a step's time. This share is near 0 if steps
wait for the disk, below one half if one sequence reads weights from memory, and near 1 in a large batch, where nothing
is drafted. It is estimated from steps that only decode. If a token of a draft is right with probability p, token k is
right with p^k. p is estimated for each sequence, for short and for long matches, also from drafts that were not
computed, since later draws show whether they were right. So a text without repetitions costs a few rows at first, and
none later.

A draft model needs one of its own steps for each drafted token of all sequences. It is asked if its drafts are worth
more, by their acceptance, than those of the lookups. If it does not pay, it is tried again from time to time.

In a mixture of experts, another row reads the weights of its experts. So sequences draft only if the rows of a step use
nearly all experts anyway.
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

DRAWN_ROWS = 64  # rows of a step with drafts from which tokens are drawn, at most
DEAR = 0.8  # nothing is looked up if rows take this share of a step's time or more
CHEAP = 0.02  # the smallest share that is assumed, for steps that wait for the disk
MARGIN = 1.25  # a draft's probability must exceed its cost by this factor
# A draft model that did not pay is tried again after PATIENCE steps, with PROBED tokens.
PATIENCE, PROBED = 64, 2
NEARLY_ALL = 0.9  # the share of the experts that counts as nearly all


def may_draft(mode: Mode, windows: Seq[int], slots: int, expert_share: float, rows: int) -> bool:
    """Return whether steps of up to `rows` rows can have drafts; not if the model has no KV cache, or has states."""
    if mode == "off" or not windows or slots:
        return False
    return mode != "auto" or uses_experts(expert_share, rows)


def uses_experts(share: float, rows: int) -> bool:
    """Return whether `rows` rows use nearly all experts, if each uses the share `share` of them."""
    return 1.0 - (1.0 - share) ** rows >= NEARLY_ALL


class RowCost:
    """The share of the rows in a step's time, from a weighted least-squares line through the steps so far.

    Before steps with different numbers of rows have been seen, the share in a step of one row is `first`.
    """

    KEPT = 0.95  # the weight of earlier steps after each step
    WEIGHT = 0.5  # the weight of `first`, as a variance of the number of rows
    SLOWEST = (
        1.5  # a step counts with at most this multiple of its expected time; it may have been interrupted
    )

    def __init__(self, first: float) -> None:
        self._first = first
        # Weighted sums: of weights, means of rows and of seconds, squares of rows, products of rows and seconds.
        self._weight = self._rows = self._seconds = self._spread = self._together = 0.0

    def note(self, rows: int, seconds: float) -> None:
        """Note the time of a step of `rows` rows."""
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
        """Return the estimated seconds of a step of `rows` rows; 0 before the first step."""
        return max(self._seconds + self._row * (rows - self._rows), 0.0) if self._seconds else 0.0

    def part(self, rows: int) -> float:
        """Return the share of the rows in the time of a step of `rows` rows without drafts."""
        if not self._seconds:
            return self._first * rows / (1.0 + self._first * (rows - 1))
        step = self.seconds(rows)
        return min(max(self._row * rows / step, CHEAP), 1.0) if step > 0 else 1.0

    @property
    def _row(self) -> float:
        """The estimated seconds of a row."""
        first = self._first * self._seconds / (1.0 + self._first * (self._rows - 1.0))
        return (self._together + self.WEIGHT * first) / (self._spread + self.WEIGHT)


class Speculation:
    """Decides what is drafted in the steps of a run."""

    def __init__(
        self, mode: Mode, streams: bool, expert_share: float, model: DraftModel | None = None
    ) -> None:
        """`streams`: steps wait for streamed weights; `expert_share`: the share of the experts that a row uses."""
        self._mode, self._expert_share = mode, expert_share
        self._cost = RowCost(CHEAP if streams else 0.3)
        self._acceptance = first_acceptances()  # the average, with which new sequences begin
        self._answers = None if mode == "prompt-lookup" else AnswerIndex()
        self._model = None if mode == "prompt-lookup" else model
        self._unasked = 0  # steps since the model was last asked
        self._threshold = 0.0

    def note_step(self, rows: int, seconds: float) -> None:
        """Note the time of a step of `rows` rows that only decoded."""
        self._cost.note(rows, seconds)

    def begin(self) -> None:
        """Begin a run; unfinished sequences of an earlier run are forgotten."""
        if self._model is not None:
            self._model.clear()

    def begin_step(self, rows: int) -> bool:
        """Begin a step that has `rows` rows without drafts; return whether anything may be drafted in it."""
        if self._mode != "auto":
            return True
        self._threshold = min(self._cost.part(rows) * MARGIN, 1.0)
        return self._threshold <= DEAR and uses_experts(self._expert_share, rows)

    def ask_model(self, sequences: Seq[tuple[Sequence, int]], rows: int) -> None:
        """Let the draft model, if there is one, draft for the sequences whose lookups promise less.

        Each sequence comes with the number of drafts for which it has room; all together have room for `rows`.
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
        """Return up to `limit` drafts for a sequence."""
        offer, probable = self._drafter(sequence).guess(sequence.tokens)
        if offer.by != MODEL:  # the draft model was asked for no more than pays
            maximum = self._length(self._threshold, probable)
            offer = replace(offer, guess=offer.guess._replace(tokens=offer.guess.tokens[:maximum]))
        return list(_drafts(sequence, offer, limit))

    def judge(self, sequence: Sequence) -> None:
        """Update the acceptances from the tokens drawn in a step, also for guesses that were not computed."""
        if sequence.drafter is not None:
            sequence.drafter.judge(sequence.tokens, self._acceptance)

    def ended(self, sequence: Sequence) -> None:
        """Index the answer of a finished sequence for the lookups of other sequences."""
        if self._answers is not None and sequence.generated:
            self._answers.add(sequence.tokens, len(sequence.request.prompt))
        if self._model is not None:
            self._model.forget(sequence)

    def _drafter(self, sequence: Sequence) -> Drafter:
        if sequence.drafter is None:
            sequence.drafter = Drafter(self._acceptance, self._answers)
        return sequence.drafter

    def _length(self, threshold: float, probable: float) -> int:
        """Return how many drafts are right with a probability above `threshold`, if p is `probable`."""
        if self._mode != "auto":
            return LONGEST
        return min(int(math.log(threshold) / math.log(probable)), LONGEST)


def _worth(probable: float, count: int, cost: float) -> float:
    """Return the mean gain, in tokens, of a draft of `count` tokens, each of which costs the time of `cost` tokens."""
    return probable * (1.0 - probable**count) / (1.0 - probable) - count * cost


def _drafts(sequence: Sequence, offer: Offer, limit: int) -> Iterator[Drafted]:
    """Yield the tokens of an offer up to the first forbidden one; tokens that a constraint determines replace them."""
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
