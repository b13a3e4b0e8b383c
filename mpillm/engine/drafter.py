"""Drafts for one sequence: what followed an earlier occurrence of its last tokens, in its own text or in an answer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpillm.engine.answer_index import COMPARED, LONGEST, NO_GUESS, AnswerIndex, Guess

Kind = Literal["prompt lookup", "answers", "model", "grammar"]
PROMPT_LOOKUP: Kind = "prompt lookup"
ANSWERS: Kind = "answers"
MODEL: Kind = "model"  # a draft model
GRAMMAR: Kind = "grammar"  # the constraint allows nothing else

SHORTEST = 2  # the shortest match, in tokens


class Drafted(NamedTuple):
    """A drafted token, and the mask of the tokens that may be drawn after it (see `Chunk.allowed`), if there is one."""

    token: int
    allowed: NDArray[np.int32] | None = None
    by: Kind = PROMPT_LOOKUP


class Lookup:
    """Prompt lookup: the tokens of one sequence, prompt and answer, 4 bytes each."""

    def __init__(self) -> None:
        self._tokens = array("i")

    def guess(self, tokens: Sequence[int]) -> Guess:
        """Return the tokens that followed the longest match of the end of `tokens`; of equal ones, the last match.

        `tokens` begin with those of the previous call. If the match reaches the end of `tokens`, the text repeats
        itself, and the guess repeats it further.
        """
        self._tokens.extend(tokens[len(self._tokens) :])
        known = np.frombuffer(self._tokens, np.int32)
        places, length = np.flatnonzero(known[:-1] == known[-1]), 1
        while length < COMPARED:
            longer = places[places >= length]
            longer = (
                longer[known[longer - length] == known[len(known) - 1 - length]] if len(longer) else longer
            )
            if not len(longer):
                break
            places, length = longer, length + 1
        if length < SHORTEST:
            return NO_GUESS
        return Guess(np.resize(known[places[-1] + 1 :][:LONGEST], LONGEST).tolist(), length)


Sort = tuple[Kind, bool]  # a drafter, and whether its match is long


class Acceptance:
    """The probability that a drafted token is right if those before it are, from the last few dozen tokens."""

    # The number of tokens that the first value counts for, and the weight of earlier values after each token.
    WEIGHT, KEPT = (
        4.0,
        0.97,
    )

    def __init__(self, first: float) -> None:
        self._right, self._all = first * self.WEIGHT, self.WEIGHT

    @property
    def value(self) -> float:
        """The probability, above 0 and below 1."""
        return (self._right + 0.01) / (self._all + 0.02)

    def note(self, right: int, wrong: int) -> None:
        """Count drafted tokens: `right` ones, and `wrong` ones that were the first wrong ones of their drafts."""
        kept = self.KEPT ** (right + wrong)
        self._right, self._all = self._right * kept + right, self._all * kept + right + wrong


Acceptances = dict[Sort, Acceptance]
OF_MODEL: Sort = MODEL, False


@dataclass(frozen=True, slots=True)
class Offer:
    """A guess, and the drafter that made it."""

    by: Kind
    guess: Guess = NO_GUESS

    @property
    def sort(self) -> Sort:
        """The key of its acceptance."""
        return self.by, self.guess.is_long


def first_acceptances() -> Acceptances:
    """Return the acceptances with which a run begins."""
    matches = {
        (kind, is_long): Acceptance(0.8 if is_long else 0.4)
        for kind in (PROMPT_LOOKUP, ANSWERS)
        for is_long in (False, True)
    }
    return {**matches, OF_MODEL: Acceptance(0.7)}


class Drafter:
    """Drafts for one sequence, and their acceptance for each drafter and for short and long matches."""

    def __init__(self, first: Acceptances, answers: AnswerIndex | None = None) -> None:
        """`first` are the acceptances of other sequences; `answers` has their answers."""
        self._acceptance = {sort: Acceptance(other.value) for sort, other in first.items()}
        self._lookup, self._answers = Lookup(), answers
        self._offers: list[Offer] = []
        self._at = 0  # the number of tokens after which they were guessed

    def guess(self, tokens: Sequence[int]) -> tuple[Offer, float]:
        """Return the best drafter's guess after `tokens`, and how probably a token is right if those before it are."""
        if not self._offers or self._at != len(tokens):
            self._at = len(tokens)
            self._offers = [Offer(PROMPT_LOOKUP, self._lookup.guess(tokens))]
            if self._answers is not None:
                self._offers.append(Offer(ANSWERS, self._answers.guess(tokens)))
        best = self._offers[0] if self._offers[0].by == MODEL else max(self._offers, key=self._probable)
        return best, self._acceptance[best.sort].value

    @property
    def of_model(self) -> float:
        """The probability that a token of the draft model is right if those before it are."""
        return self._acceptance[OF_MODEL].value

    def take(self, drafted: list[int]) -> None:
        """Use the draft model's tokens instead of the other guesses of the same step."""
        self._offers.insert(0, Offer(MODEL, Guess(drafted, 0)))

    def judge(self, tokens: Sequence[int], others: Acceptances) -> None:
        """Compare the last guesses with `tokens`, and update the acceptances of this sequence and `others`."""
        for offer in self._offers:
            guessed = offer.guess.tokens
            seen = tokens[self._at : self._at + len(guessed)]
            right = common(seen, guessed)
            for one in (self._acceptance[offer.sort], others[offer.sort]):
                one.note(right, int(right < len(seen)))
        self._offers = []

    def _probable(self, offer: Offer) -> float:
        return self._acceptance[offer.sort].value if offer.guess.tokens else 0.0


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
