"""The scheduler: continuous batching over a fixed number of KV blocks and of slots for states."""

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
    """Chooses the sequences of each step: a token of every decoding sequence, and chunks of prompts, the oldest first.

    A sequence is admitted if there are blocks for its tokens, and gets each block when it first needs it
    (`CacheAllocator`). If no block is left, the youngest sequence is preempted: it releases its blocks, keeps its
    tokens and is computed again later. So the oldest sequence always continues, and all sequences finish.

    If the model has states, an admitted sequence has a slot from its first token until it finishes or is preempted.

    Sequences that draw a token in a step may get drafts, if rows and blocks are left over.

    Sequences that score different texts after a common prompt (`Request.followed`) are computed one after the other in
    the same blocks, so each adds only its own tokens, also if the prompt ends within a block.

    With LongRoPE, a sequence that becomes longer than `short_length` has other keys from its first token on: it
    releases its blocks and is computed again. So its answer does not depend on which of its tokens were generated.

    With `whole_prompts` no sequence grows, and an admitted sequence has all its blocks, so none is preempted.
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
        self.running: list[Sequence] = []  # by age, the oldest first
        self._preempted: list[Sequence] = []  # by age, the oldest first
        self._max_running = limits.max_running
        self._has_windows = any(limits.windows)
        self._cache = CacheAllocator(limits, self.totals)
        self._queue = SequenceQueue(waiting, limits)

    def has_work(self) -> bool:
        """Return whether any sequence is not finished; asks the iterator for new ones."""
        return bool(self._queue.first or self.running or self._preempted)

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences that have been admitted and are not finished."""
        return [*self.running, *self._preempted]

    @property
    def blocks_in_use(self) -> int:
        """The number of KV blocks that sequences hold."""
        return self._cache.used

    def next(self, micro_batches: int) -> list[tuple[Sequence, int]]:
        """Return the sequences of the next step, each with its number of tokens; empty if all are in flight.

        At most `micro_batches` steps are in flight, so a step takes its share of all sequences.
        """
        self._cache.begin_step()
        if self.limits.short_length:
            self._lengthen()
        if self._has_windows:
            for sequence in self.running:
                if not sequence.in_flight:
                    self._cache.drop_behind(sequence, sequence.computed)
        self._admit()
        share = -(-len(self.running) // micro_batches)  # the other sequences are for the next micro-batches
        chosen, rows_left = self._choose(min(share, self.limits.max_sequences))
        for sequence, _ in chosen:
            sequence.in_flight = True
        if self._speculation is not None:
            self._draft(self._speculation, chosen, rows_left)
        return chosen

    def give_back(self, sequence: Sequence) -> None:
        """Release the blocks of rejected drafts."""
        self._cache.give_back(sequence)

    def release(self, sequence: Sequence) -> None:
        """Remove a finished sequence; its blocks are released, or given to its heir."""
        self.running.remove(sequence)
        heir = sequence.heir
        if heir is not None:
            heir.started = time.monotonic()
            inherits = self._cache.inherit(heir, sequence)
            insort(self.running if inherits else self._preempted, heir, key=_number)
        self._cache.release(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Remove an admitted sequence that is not in flight, and release its blocks and its slot."""
        (self.running if sequence in self.running else self._preempted).remove(sequence)
        self._cache.release(sequence)

    def _lengthen(self) -> None:
        """Restart sequences that have become too long for LongRoPE's short factors; they keep their places."""
        for sequence in self.running:
            if not sequence.in_flight and sequence.outgrows(self.limits.short_length):
                self._cache.release_blocks(sequence)
                sequence.lengthen()

    def _admit(self) -> None:
        """Admit preempted, then waiting sequences while there are blocks for them and for all others' next tokens."""
        cache = self._cache
        owed = growing = -1  # blocks that running sequences need; computed only if a sequence may be admitted
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
        """Return up to `maximum` sequences, each with its number of tokens, and the number of rows left in the step."""
        limits, cache = self.limits, self._cache
        budget = limits.max_tokens
        decoding = sum(sequence.left == 1 for sequence in self.running if not sequence.in_flight)
        chosen: list[tuple[Sequence, int]] = []
        at = 0
        while at < len(self.running) and len(chosen) < maximum and budget > 0:
            sequence = self.running[at]  # preemption removes only sequences after it
            at += 1
            if sequence.in_flight:
                continue
            if limits.whole_prompts and sequence.left > budget:
                continue
            decodes = sequence.left == 1
            decoding -= decodes
            if not decodes and cache.share(sequence):
                continue
            # Decoding sequences have priority over prompts, except over the oldest sequence, which always continues.
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
        """Allocate blocks for up to `count` tokens, preempting others if none is free; return for how many."""
        if not count:
            return 0
        allocated = self._cache.allocate(sequence, count)
        while not allocated and self._preempt_after(sequence):
            allocated = self._cache.allocate(sequence, count)
        return allocated

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Preempt the youngest sequence that has blocks and is younger than `sequence`; False if there is none."""
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
        """Give the chosen sequences drafts of at most `rows` tokens in total.

        Drafts use no block that a sequence may need for its next token, and none that would spill layers to disk.
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
