"""The order in which the lines of an input are computed: those that begin alike together, long answers first.

The prompts of an input form a tree, whose nodes are what prompts begin with. The tree is walked from its root: a
subtree as a whole, and of the subtrees of a node the one with the longest answer first. So the KV cache holds what
prompts have in common while they need it, and what takes the most steps does not begin last, when nothing is left to
run beside it. Results do not depend on the order.

Near the root lie beginnings that the cache can keep all the time, such as the system prompts of chats: a part of the
cache (`KEPT`) holds all of them together. Their subtrees are walked as if they hung from the root, so that the longest
answers of all come first, not those of each system prompt.

Of a prompt 2 bytes are kept for every level of the tree. The levels lie at each of the first 8 blocks of the KV cache,
and each further one an eighth further back, so that a common beginning is known to within an eighth of its length.

Lines are ordered within pieces of the input of `PIECE` lines, each with a tree of its own, so that of an input of any
length 4 bytes a line are kept, and the rest of one piece alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from mpillm.batch.work import Work
from mpillm.kernels import KV_BLOCK

PIECE = 1 << 18  # lines that are ordered together
WINDOW = 1024  # works that `ordered` holds
KEPT = 4  # common beginnings may keep one in KEPT blocks of the KV cache
FINE = 8  # the distance between two levels is 1 / FINE of the level, but at least a block


class Order:
    """Takes the lines of an input in their order (`add`), and says in which one to compute them (`indices`)."""

    def __init__(self, cached_tokens: int = 0) -> None:
        """`cached_tokens` is what the KV cache holds."""
        self._kept = cached_tokens // KV_BLOCK // KEPT  # blocks
        self._indices = array("i")  # the line numbers of the complete pieces, in order
        self._begin()

    def _begin(self) -> None:
        """Begin a piece."""
        self._hashes = array("H")  # hashes of each line's first prompt, up to each level
        self._ends = array("q", [0])  # where each line's hashes end
        self._lengths = array("q")  # for each line: tokens to generate << 32 + tokens of the prompt

    def add(self, work: Work | None) -> None:
        """The next line; None for one that is not computed."""
        if work is not None:
            self._hashes.extend(_hashes(work.requests[0].prompt))
            generated = max(request.max_tokens * (not request.only_reads) for request in work.requests)
            self._lengths.append(generated << 32 | max(len(request.prompt) for request in work.requests))
        else:
            self._lengths.append(0)
        self._ends.append(len(self._hashes))
        if len(self._lengths) == PIECE:
            self.indices()

    def indices(self) -> NDArray[np.int32]:
        """Return the numbers of the lines so far [lines], from 0, in the order of computing; ends a piece."""
        if self._lengths:
            self._indices.frombytes((self._walk() + len(self._indices)).astype(np.int32).tobytes())
            self._begin()
        return np.frombuffer(self._indices, np.int32)

    def _walk(self) -> NDArray[np.int32]:
        """Return the lines of a piece in the order of its tree."""
        hashes = np.frombuffer(self._hashes, np.uint16)
        ends, lengths = np.frombuffer(self._ends, np.int64), np.frombuffer(self._lengths, np.int64)
        place = np.zeros(len(lengths), np.int32)  # where the lines of each line's node begin
        left = np.arange(len(lengths), dtype=np.int32)  # lines that share their node with others
        level = self._first_level(hashes, ends)
        while len(left) > 1:
            at = ends[left] + level
            deeper = at < ends[left + 1]
            child = left + (1 << 16)  # a prompt that ends before the level is a child of its own
            child[deeper] = hashes[at[deeper]]
            by = np.lexsort((child, place[left]))
            left, child = left[by], child[by]
            starts = np.flatnonzero(_changes(place[left]) | _changes(child))
            sizes = np.diff(starts, append=len(left))
            longest, first = np.maximum.reduceat(lengths[left], starts), np.minimum.reduceat(left, starts)
            by = np.lexsort((first, -longest, place[left[starts]]))
            starts, sizes = starts[by], sizes[by]
            node, before = place[left[starts]], np.cumsum(sizes) - sizes
            begins = node + before - np.maximum.accumulate(np.where(_changes(node), before, 0))
            left = left[np.repeat(starts - before, sizes) + np.arange(len(left))]
            place[left] = np.repeat(begins, sizes)
            left = left[np.repeat(sizes > 1, sizes)]
            level += 1
        order = np.empty_like(place)
        order[place] = np.arange(len(place))
        return order

    def _first_level(self, hashes: NDArray[np.uint16], ends: NDArray[np.int64]) -> int:
        """Return the level up to which the cache can keep all that several lines begin with."""
        counts, blocks, level = np.diff(ends), 0, 0
        for level, (begin, end) in enumerate(pairwise(_levels(self._kept))):
            found = hashes[ends[:-1][counts > level] + level]
            blocks += int(np.count_nonzero(np.bincount(found) > 1)) * (end - begin)
            if blocks > self._kept:
                break
        return level


def ordered(works: Iterable[Work], cached_tokens: int = 0) -> Iterator[Work]:
    """Works in this order within windows of `WINDOW`, for callers that have not seen the whole input."""
    source = iter(works)
    while window := list(islice(source, WINDOW)):
        order = Order(cached_tokens)
        for work in window:
            order.add(work)
        yield from (window[index] for index in order.indices())


def _hashes(prompt: tuple[int, ...]) -> Iterator[int]:
    """Yield a hash of what the prompt begins with up to each level."""
    content, state = memoryview(array("i", prompt).tobytes()), blake2b(digest_size=2)
    for begin, end in pairwise(_levels(len(prompt) // KV_BLOCK)):
        state.update(content[4 * KV_BLOCK * begin : 4 * KV_BLOCK * end])
        yield int.from_bytes(state.copy().digest(), "little")


def _levels(blocks: int) -> Iterator[int]:
    """Yield the levels of a prompt of `blocks` full blocks, in blocks, from 0."""
    level = 0
    while level <= blocks:
        yield level
        level += max(level // FINE, 1)


def _changes(values: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return whether each value differs from the one before it; true for the first."""
    changes: NDArray[np.bool_] = np.diff(values, prepend=values[:1] - 1) != 0
    return changes
