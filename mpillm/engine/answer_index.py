"""An index of finished answers: it finds which tokens followed an earlier occurrence of the last tokens.

A hash table gives the last place of each run of `RUN` tokens, and the places of equal runs are linked from the last to
the first (as in the compressor of RFC 1951, section 4). Memory is bounded, and the cost of a lookup does not grow with
the number of indexed answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 15  # tokens of a draft, at most
COMPARED = 32  # tokens before a draft that are compared, at most
LONG = 5  # tokens from which on a match is much likelier to be right
RUN = 3  # the shortest match, in tokens
TRIED = 8  # places of a run that are compared, the last ones first
KEPT = 1 << 16  # indexed tokens, at most; when the index is full, the oldest half is dropped
NBYTES = 3 * 4 * KEPT  # bytes of an index
END = -1  # marks the end of each answer

# The factor of a multiplicative hash: 2^32 divided by the golden ratio (Knuth, volume 3, section 6.4).
_FACTOR = 0x9E3779B1


class Guess(NamedTuple):
    """Tokens that may follow a text."""

    tokens: list[int]
    matched: int  # the length of the match: tokens before them that are also the last ones of the text

    @property
    def is_long(self) -> bool:
        """Whether the match is a long one."""
        return self.matched >= LONG


NO_GUESS = Guess([], 0)


class AnswerIndex:
    """The last finished answers, at most `kept` tokens (a power of two)."""

    def __init__(self, kept: int = KEPT) -> None:
        # The token at each place, and the previous place of the same run.
        self._tokens, self._earlier = np.empty((2, kept), np.int32)
        self._last = np.full(kept, -1, np.int32)  # the last place of each run, by hash
        self._bits = kept.bit_length() - 1
        self._count = 0

    def add(self, tokens: Sequence[int], start: int) -> None:
        """Index the answer `tokens[start:]`, with the last tokens of its prompt."""
        kept = len(self._tokens)
        own = np.array([*tokens[max(start - RUN, 0) :][: kept // 2 - 1], END], np.int32)
        if self._count + len(own) > kept:
            left = self._tokens[kept // 2 : self._count].copy()
            self._last.fill(-1)
            self._count = 0
            self._append(left)
        self._append(own)

    def guess(self, tokens: Sequence[int]) -> Guess:
        """Return the tokens that followed the longest match of the end of `tokens`; of equal ones, the last match."""
        if not self._count or len(tokens) < RUN:
            return NO_GUESS
        tail = np.array(tokens[: -COMPARED - 1 : -1], np.int32)  # the last token first
        place = int(self._last[self._hash(tokens[-RUN:])])
        best, longest = -1, RUN - 1
        for _ in range(TRIED):
            if place < 0:
                break
            there = self._tokens[max(place + 1 - len(tail), 0) : place + 1][::-1]
            differ = np.flatnonzero(there != tail[: len(there)])
            length = int(differ[0]) if len(differ) else len(there)
            if length > longest:
                best, longest = place, length
            place = int(self._earlier[place])
        if best < 0:
            return NO_GUESS
        following = self._tokens[best + 1 : min(best + 1 + LONGEST, self._count)].tolist()
        return Guess(following[: following.index(END)] if END in following else following, longest)

    def _append(self, tokens: NDArray[np.int32]) -> None:
        begin, end = self._count, self._count + len(tokens)
        self._tokens[begin:end] = tokens
        self._count = end
        begin = max(begin, RUN - 1)
        if end <= begin:
            return
        hashes = np.zeros(end - begin, np.uint32)
        for i in range(RUN - 1, -1, -1):
            hashes = (hashes + self._tokens[begin - i : end - i].astype(np.uint32)) * np.uint32(_FACTOR)
        hashes >>= np.uint32(32 - self._bits)
        order = np.argsort(hashes, kind="stable")
        first = np.append(True, hashes[order[1:]] != hashes[order[:-1]])
        self._earlier[begin + order[1:]] = begin + order[:-1]
        self._earlier[begin + order[first]] = self._last[hashes[order[first]]]
        self._last[hashes] = np.arange(begin, end, dtype=np.int32)

    def _hash(self, run: Sequence[int]) -> int:
        """Return the hash under which `_append` stores a run."""
        found = 0
        for token in run:
            found = (found + token) * _FACTOR & 0xFFFFFFFF
        return found >> (32 - self._bits)
