"""What is drafted for one sequence by prompt lookup: what followed where its last tokens stood before."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 15  # tokens of a draft
SHORTEST, COMPARED = 2, 32  # tokens that must have stood there before, and those that are compared
LONG = 5  # from so many on, what followed is much likelier to follow again


class Drafted(NamedTuple):
    """A token that is drafted, and which tokens may be drawn behind it (see `Chunk.allowed`) if that is limited."""

    token: int
    allowed: NDArray[np.int32] | None = None


class Guess(NamedTuple):
    """What may follow a text."""

    tokens: list[int]
    matched: int  # tokens that stood before them there, and end the text here

    @property
    def is_long(self) -> bool:
        """Whether many tokens stood there."""
        return self.matched >= LONG


NO_GUESS = Guess([], 0)


class Lookup:
    """One sequence's tokens, prompt and answer, as they grow: 4 bytes each."""

    def __init__(self) -> None:
        self._tokens = array("i")

    def guess(self, tokens: Sequence[int]) -> Guess:
        """What may follow `tokens`, of which those of the last call were the beginning.

        It followed the longest text with which `tokens` ends, and of several places the last one. A text that repeats
        itself up to its end is thought to go on so.
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


class Acceptance:
    """How probable it is that a drafted token is right, if those before it are: of the last few dozen tokens."""

    WEIGHT, KEPT = (
        4.0,
        0.97,
    )  # tokens that the first value counts for; what each token leaves of the earlier ones

    def __init__(self, first: float) -> None:
        self._right, self._all = first * self.WEIGHT, self.WEIGHT

    @property
    def value(self) -> float:
        """Above 0 and below 1."""
        return (self._right + 0.01) / (self._all + 0.02)

    def note(self, right: int, wrong: int) -> None:
        """So many more drafted tokens were right, or the first wrong ones."""
        kept = self.KEPT ** (right + wrong)
        self._right, self._all = self._right * kept + right, self._all * kept + right + wrong


class Drafter:
    """What is drafted for one sequence, and how good that was: apart for short and for long matches."""

    def __init__(self, first: Sequence[Acceptance]) -> None:
        """`first` are those of other sequences."""
        self._acceptance = [Acceptance(other.value) for other in first]
        self._lookup = Lookup()
        self._guess = NO_GUESS
        self._at = 0  # the number of tokens that it follows

    def guess(self, tokens: Sequence[int]) -> tuple[list[int], float]:
        """What may follow `tokens`, and how probable each token is if those before it are right."""
        self._at, self._guess = len(tokens), self._lookup.guess(tokens)
        return self._guess.tokens, self._acceptance[self._guess.is_long].value

    def judge(self, tokens: Sequence[int], others: Sequence[Acceptance]) -> None:
        """Note for this sequence and for `others` how much of the last guess was right, as far as `tokens` tell."""
        guessed, self._guess, is_long = self._guess.tokens, NO_GUESS, self._guess.is_long
        seen = tokens[self._at : self._at + len(guessed)]
        right = common(seen, guessed)
        for one in (self._acceptance[is_long], others[is_long]):
            one.note(right, int(right < len(seen)))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
