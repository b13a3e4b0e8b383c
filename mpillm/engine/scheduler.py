"""Who runs in this step: continuous batching over a fixed number of KV blocks."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from mpillm.engine.blocks import BlockPool
from mpillm.engine.sequence import Sequence
from mpillm.kernels import KV_BLOCK


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and the KV cache can take."""

    n_blocks: int  # KV blocks of `KV_BLOCK` tokens, the same number on every rank
    blocks_in_memory: int  # of them: when more are in use, layers lie on disk
    max_sequences: int  # in one step
    max_tokens: int  # in one step
    micro_batches: int  # steps in flight at once, at most: one for each stage keeps all of them busy
    prefix_sharing: bool = True  # compute what sequences begin with alike only once
    streams: bool = False  # each step costs some rank a pass over weights that do not stay in memory


@dataclass(slots=True)
class Totals:
    """What has been done so far. Every prompt token is counted once, as computed or as shared."""

    steps: int = 0
    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # of prompts: not computed, because another sequence had them
    recomputed_tokens: int = 0  # computed before, and again because their blocks had been given away
    generated_tokens: int = 0
    preemptions: int = 0
    fetched_rows: int = 0  # draws that the candidates at hand could not decide, so more had to be asked for
    most_sequences: int = 0
    most_blocks: int = 0


def blocks_for(tokens: int) -> int:
    """KV blocks that hold `tokens` tokens."""
    return -(-tokens // KV_BLOCK)


class Scheduler:
    """Fills each step: a token of every sequence that decodes, and prompts in chunks; the oldest first.

    A sequence is admitted when there are blocks for the tokens that it has, and gets each block when it first
    needs it. Where none is left, the youngest gives all of its blocks back, keeps its tokens, and is computed again
    later. So the oldest always goes on, whoever else is there, and therefore everybody finishes.

    Followers take a step's layers one after the other, in the order of the steps. So a block may be shared as soon
    as a step that computes it has been sent; a sequence that would compute the same in the very same step waits.
    """

    def __init__(self, limits: Limits, waiting: Iterator[Sequence], totals: Totals | None = None) -> None:
        self.limits = limits
        self.totals = totals or Totals()
        self.running: list[Sequence] = []  # the oldest first
        self._preempted: list[Sequence] = []  # the oldest first
        self._slots = limits.max_sequences * limits.micro_batches
        self._waiting = enumerate(_longest_first(waiting, self._slots))
        self._next = self._take_next()
        self._pool = BlockPool(limits.n_blocks, limits.blocks_in_memory)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is not finished."""
        return bool(self.running or self._preempted or self._next)

    @property
    def unfinished(self) -> list[Sequence]:
        """Who has been admitted and is not finished."""
        return [*self.running, *self._preempted]

    @property
    def blocks_in_use(self) -> int:
        """KV blocks that sequences hold now."""
        return self._pool.used

    def next(self, micro_batches: int) -> list[tuple[Sequence, int]]:
        """The next step's sequences with how many tokens of each to compute; empty if all are in flight.

        At most `micro_batches` steps will be in flight, so it takes its share of all sequences.
        """
        limits = self.limits
        self._admit()
        share = -(-len(self.running) // micro_batches)  # leave the others for the micro-batches behind
        most = min(share, limits.max_sequences)
        budget = limits.max_tokens
        decoding = sum(sequence.left == 1 for sequence in self.running if not sequence.in_flight)
        chosen: list[tuple[Sequence, int]] = []
        coming: set[bytes] = set()  # keys of the blocks that this step fills
        at = 0
        while at < len(self.running) and len(chosen) < most and budget > 0:
            sequence = self.running[at]  # what is preempted stands behind it
            at += 1
            if sequence.in_flight:
                continue
            decodes = sequence.left == 1
            decoding -= decodes
            if not decodes and self._share(sequence, coming):
                continue
            # Decoding goes first, but for the oldest: it always goes on.
            kept = 0 if decodes else min(decoding, most - len(chosen) - 1)
            room = max(budget - kept, int(not chosen))
            count = self._give_blocks(sequence, min(sequence.left, room)) if room else 0
            if count:
                self._count_shared(sequence)
                if limits.prefix_sharing:
                    coming.update(self._name_blocks(sequence, count))
                budget -= count
                chosen.append((sequence, count))
        for sequence, _ in chosen:
            sequence.in_flight = True
        return chosen

    def release(self, sequence: Sequence) -> None:
        """Take a finished sequence out and its blocks back."""
        self.running.remove(sequence)
        self._clear(sequence)

    def _take_next(self) -> Sequence | None:
        """The first in the queue, which is taken from one by one: a job's sequences need not all be in memory."""
        numbered = next(self._waiting, None)
        if numbered is None:
            return None
        number, sequence = numbered
        assert blocks_for(sequence.request.max_length) <= self.limits.n_blocks, (
            "a job refuses what could never run"
        )
        sequence.number = number
        return sequence

    def _admit(self) -> None:
        """Admit who has been preempted, then who waits, while their tokens and the next of all others find blocks."""
        owed = sum(_missing(sequence) for sequence in self.running)
        growing = sum(_grows(sequence) for sequence in self.running)
        while len(self.running) < self._slots:
            sequence = self._preempted[0] if self._preempted else self._next
            if sequence is None:
                return
            self._share(sequence)
            owed += _missing(sequence)
            if self.running and owed + growing > self._pool.free:
                self._clear(sequence)
                return
            growing += _grows(sequence)
            if self._preempted:
                del self._preempted[0]
            else:
                sequence.started = time.monotonic()
                self._next = self._take_next()
            insort(self.running, sequence, key=_number)

    def _share(self, sequence: Sequence, coming: frozenset[bytes] | set[bytes] = frozenset()) -> bool:
        """Let a sequence skip blocks that another one has computed; True if it should wait for one of `coming`."""
        if not self.limits.prefix_sharing:
            return False
        # The last token is computed in any case, for the token after it.
        end = len(sequence.tokens) - 1
        if sequence.request.needs_all_rows:
            end = min(end, sequence.reached)
        while sequence.computed % KV_BLOCK == 0 and sequence.computed + KV_BLOCK <= end:
            key = sequence.block_key(len(sequence.blocks))
            if key in coming:
                return True
            block = self._pool.find(key)
            if block is None:
                return False
            sequence.blocks.append(block)
            sequence.computed += KV_BLOCK
        return False

    def _give_blocks(self, sequence: Sequence, count: int) -> int:
        """Give blocks for `count` more tokens, or for as many as there is room for; returns for how many."""
        pool, blocks = self._pool, sequence.blocks
        if len(blocks) * KV_BLOCK == sequence.computed:
            while not pool.free:
                if not self._preempt_after(sequence):
                    return 0
        need = min(blocks_for(sequence.computed + count) - len(blocks), pool.free)
        blocks.extend(pool.take() for _ in range(need))
        return min(count, len(blocks) * KV_BLOCK - sequence.computed)

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Take the blocks of the youngest behind `sequence` that has some; False if there is none."""
        for victim in reversed(self.running):
            if victim is sequence:
                return False
            if victim.blocks and not victim.in_flight:
                self.running.remove(victim)
                self._clear(victim)
                insort(self._preempted, victim, key=_number)
                self.totals.preemptions += 1
                return True
        return False

    def _name_blocks(self, sequence: Sequence, count: int) -> Iterator[bytes]:
        """The keys of the blocks that the next `count` tokens fill, which can be found by them from now on."""
        for index in range(sequence.computed // KV_BLOCK, (sequence.computed + count) // KV_BLOCK):
            key = sequence.block_key(index)
            self._pool.name(sequence.blocks[index], key)
            yield key

    def _count_shared(self, sequence: Sequence) -> None:
        """Only tokens that were never computed count: after a preemption a sequence may find its own blocks again."""
        if sequence.computed > sequence.reached:
            self.totals.shared_tokens += sequence.computed - sequence.reached
            sequence.reached = sequence.computed

    def _clear(self, sequence: Sequence) -> None:
        self._pool.give_back(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0


def _missing(sequence: Sequence) -> int:
    """Blocks that a sequence still needs for the tokens it has."""
    return blocks_for(len(sequence.tokens)) - len(sequence.blocks)


def _grows(sequence: Sequence) -> bool:
    """Whether it may come to need more blocks than for the tokens it has."""
    return sequence.request.max_length > blocks_for(len(sequence.tokens)) * KV_BLOCK


def _number(sequence: Sequence) -> int:
    return sequence.number


def _longest_first(sequences: Iterator[Sequence], window: int) -> Iterator[Sequence]:
    """Let sequences that only read (scores, embeddings) go in windows, the longest of each first.

    A long prompt's chunks must follow each other, so at the end of a run it should not be the one that is left.
    Sequences that generate go on as they come: how long they will be is not known.
    """
    readers: list[Sequence] = []
    for sequence in sequences:
        if not sequence.request.only_reads:
            yield sequence
            continue
        readers.append(sequence)
        if len(readers) == window:
            yield from sorted(readers, key=_length, reverse=True)
            readers.clear()
    yield from sorted(readers, key=_length, reverse=True)


def _length(sequence: Sequence) -> int:
    return len(sequence.tokens)
