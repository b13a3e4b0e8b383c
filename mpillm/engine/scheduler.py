"""Which sequences run in this step: continuous batching over a fixed number of KV blocks and of slots for states."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator

from mpillm.engine.cache import CacheAllocator
from mpillm.engine.limits import Limits, Totals
from mpillm.engine.queue import SequenceQueue
from mpillm.engine.sequence import Sequence
from mpillm.engine.speculation import DRAWN_ROWS, Speculation
from mpillm.kernels import KV_BLOCK


class Scheduler:
    """Fills each step: a token of every sequence that decodes, and prompts in chunks; the oldest first.

    A sequence is admitted when there are blocks for the tokens that it has, and gets each block when it first needs it
    (`CacheAllocator`). Where no block is left, the youngest sequence releases all of its blocks, keeps its tokens, and
    is computed again later. So the oldest always goes on, whatever others there are, and therefore all finish.

    If the model has states, an admitted sequence has a slot for its own, from its first token until it finishes or is
    preempted.

    When a step's chunks are chosen, sequences that draw a token in it may get drafts as well, where rows and blocks are
    left that nobody needs.

    Sequences that differ only in what is scored behind a common prompt (`Request.followed`) are computed one after the
    other in the same blocks, so each of them adds only its own tokens, also where the prompt ends inside a block.

    In models with LongRoPE a sequence that outgrows `short_length` has other keys from its first token on: it releases
    its blocks and is computed again. So its answer does not depend on how its tokens came about.

    With `whole_prompts` no sequence grows, and one that is admitted has blocks for all of it: none is preempted.
    """

    def __init__(
        self,
        limits: Limits,
        waiting: Iterator[Sequence],
        totals: Totals | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.limits = limits
        self.totals = totals or Totals()
        self._speculation = speculation
        self.running: list[Sequence] = []  # the oldest first
        self._preempted: list[Sequence] = []  # the oldest first
        self._max_running = limits.max_running
        self._has_windows = any(limits.windows)
        self._cache = CacheAllocator(limits, self.totals)
        self._queue = SequenceQueue(waiting, limits)

    def has_work(self) -> bool:
        """Whether any sequence is not finished; looks for new ones."""
        return bool(self._queue.first or self.running or self._preempted)

    @property
    def unfinished(self) -> list[Sequence]:
        """Who has been admitted and is not finished."""
        return [*self.running, *self._preempted]

    @property
    def blocks_in_use(self) -> int:
        """KV blocks that sequences hold now."""
        return self._cache.used

    def next(self, micro_batches: int) -> list[tuple[Sequence, int]]:
        """The next step's sequences with how many tokens of each to compute; empty if all are in flight.

        At most `micro_batches` steps will be in flight, so it takes its share of all sequences.
        """
        self._cache.begin_step()
        if self.limits.short_length:
            self._lengthen()
        if self._has_windows:
            for sequence in self.running:
                if not sequence.in_flight:
                    self._cache.drop_behind(sequence, sequence.computed)
        self._admit()
        share = -(-len(self.running) // micro_batches)  # leave the others for the micro-batches behind
        chosen, rows_left = self._choose(min(share, self.limits.max_sequences))
        for sequence, _ in chosen:
            sequence.in_flight = True
        if self._speculation is not None:
            self._draft(self._speculation, chosen, rows_left)
        return chosen

    def give_back(self, sequence: Sequence) -> None:
        """Release the blocks of drafts that were not accepted."""
        self._cache.give_back(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take a finished sequence out, with its blocks and its slot, unless another one goes on in its place."""
        self.running.remove(sequence)
        heir = sequence.heir
        if heir is not None:
            heir.started = time.monotonic()
            inherits = self._cache.inherit(heir, sequence)
            insort(self.running if inherits else self._preempted, heir, key=_number)
        self._cache.release(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Take out an admitted sequence that is not in flight, with its blocks and its slot."""
        (self.running if sequence in self.running else self._preempted).remove(sequence)
        self._cache.release(sequence)

    def _lengthen(self) -> None:
        """Let sequences that have outgrown the short factors begin again with the long ones, in their places."""
        for sequence in self.running:
            if not sequence.in_flight and sequence.outgrows(self.limits.short_length):
                self._cache.release_blocks(sequence)
                sequence.lengthen()

    def _admit(self) -> None:
        """Admit preempted sequences, then waiting ones, while blocks suffice for their tokens and all others' next."""
        cache = self._cache
        owed = growing = -1  # of the running ones; not known before one may join them
        while len(self.running) < self._max_running:
            sequence = self._preempted[0] if self._preempted else self._queue.first
            if sequence is None:
                return
            if owed < 0:
                owed = sum(map(cache.missing, self.running))
                growing = sum(map(cache.growing, self.running))
            cache.share(sequence)
            owed += cache.missing(sequence)
            if self.running and owed + growing > cache.free:
                cache.release(sequence)
                return
            growing += cache.growing(sequence)
            cache.assign_slot(sequence)
            if self._preempted:
                del self._preempted[0]
            else:
                sequence.started = time.monotonic()
                self._queue.pop()
            insort(self.running, sequence, key=_number)

    def _choose(self, maximum: int) -> tuple[list[tuple[Sequence, int]], int]:
        """Up to `maximum` sequences with how many tokens of each to compute, and how many rows the step has left."""
        limits, cache = self.limits, self._cache
        budget = limits.max_tokens
        decoding = sum(sequence.left == 1 for sequence in self.running if not sequence.in_flight)
        chosen: list[tuple[Sequence, int]] = []
        at = 0
        while at < len(self.running) and len(chosen) < maximum and budget > 0:
            sequence = self.running[at]  # what is preempted stands behind it
            at += 1
            if sequence.in_flight:
                continue
            if limits.whole_prompts and sequence.left > budget:
                continue
            decodes = sequence.left == 1
            decoding -= decodes
            if not decodes and cache.share(sequence):
                continue
            # Decoding goes first, but for the oldest: it always goes on.
            kept = 0 if decodes or limits.whole_prompts else min(decoding, maximum - len(chosen) - 1)
            allowed = max(budget - kept, int(not chosen))
            saves = not decodes and cache.can_save(sequence)
            wanted = sequence.save_at - sequence.computed if saves else sequence.left
            count = self._allocate(sequence, min(wanted, sequence.left, allowed))
            if count:
                cache.compute(sequence, count, saves and count == wanted)
                budget -= count
                chosen.append((sequence, count))
        return chosen, budget

    def _allocate(self, sequence: Sequence, count: int) -> int:
        """Allocate blocks for up to `count` tokens, preempting others if there is none; returns for how many."""
        if not count:
            return 0
        allocated = self._cache.allocate(sequence, count)
        while not allocated and self._preempt_after(sequence):
            allocated = self._cache.allocate(sequence, count)
        return allocated

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Preempt the youngest sequence behind `sequence` that has blocks; False if there is none."""
        for victim in reversed(self.running):
            if victim is sequence:
                return False
            if victim.tables[0].blocks and not victim.in_flight:
                self.running.remove(victim)
                self._cache.release(victim)
                insort(self._preempted, victim, key=_number)
                self.totals.preemptions += 1
                return True
        return False

    def _draft(self, speculation: Speculation, chosen: list[tuple[Sequence, int]], rows: int) -> None:
        """Give the chosen sequences drafts of up to `rows` tokens together.

        They take no block that a sequence may need for its next token, and none that would send layers to disk.
        """
        rows = min(rows, DRAWN_ROWS - len(chosen))
        if rows <= 0 or not speculation.begin_step(len(chosen)):
            return
        capacities = [
            (sequence, capacity)
            for sequence, computes in chosen
            if (capacity := sequence.capacity(computes)) > 0
        ]
        speculation.ask_model(capacities, rows)
        spare = self._cache.free_in_memory - len(self.running)
        for sequence, computes in chosen:
            end, blocks = sequence.computed + computes, sequence.tables[0].end
            capacity = blocks * KV_BLOCK - end + KV_BLOCK * max(spare, 0)
            maximum = min(rows, capacity, sequence.capacity(computes))
            if self.limits.short_length and not sequence.long:
                maximum = min(maximum, self.limits.short_length - end)
            if maximum <= 0:
                continue
            sequence.drafts = speculation.draft(sequence, maximum)
            rows -= len(sequence.drafts)
            self._cache.allocate(sequence, computes + len(sequence.drafts))
            spare -= sequence.tables[0].end - blocks


def _number(sequence: Sequence) -> int:
    return sequence.number
