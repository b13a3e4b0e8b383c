"""Which sequences run in this step: continuous batching over a fixed number of KV blocks and of slots for states."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count

from mpillm.engine.blocks import NO_SLOT, BlockPool, BlockTable
from mpillm.engine.limits import Limits, Totals
from mpillm.engine.saved_states import SavedStates
from mpillm.engine.sequence import Sequence
from mpillm.engine.speculation import DRAWN_ROWS, Speculation
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_for, first_kept, window_blocks


class Scheduler:
    """Fills each step: a token of every sequence that decodes, and prompts in chunks; the oldest first.

    A sequence is admitted when there are blocks for the tokens that it has, and gets each block when it first needs it:
    one in each group of layers. In groups with a window it releases the blocks that lie behind the window. Where no
    block is left, the youngest sequence releases all of its blocks, keeps its tokens, and is computed again later. So
    the oldest always goes on, whatever others there are, and therefore all finish.

    Followers compute a step's layers one after the other, in the order of the steps. So a block may be shared as soon
    as a step that computes it has been sent, and reused as soon as the last step that reads it has been; a sequence
    that would compute the same in the very same step waits. A prefix can be shared up to the end of any full block, if
    all blocks that the next token attends to are still there: those of the last `window` tokens in groups with a
    window, and all others in the other groups.

    If the model has states, an admitted sequence has a slot for its own, from its first token until it finishes or is
    preempted. A prefix is then shared where states were saved too (`SavedStates`): a chunk ends where they are to be.

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
        self._free_slots = list(range(limits.n_slots))  # a heap
        self._saved = SavedStates(limits.n_slots, limits.n_saved)
        sharable = limits.n_saved if limits.n_slots else limits.windows
        self._shares = limits.prefix_sharing and bool(sharable) and not limits.whole_prompts
        self._inherits = self._shares and not limits.n_slots
        self._full = [group for group, window in enumerate(limits.windows) if not window]
        self._windowed = [(group, window) for group, window in enumerate(limits.windows) if window]
        self._pool = BlockPool(limits.n_blocks, limits.blocks_in_memory)
        self._waiting, self._numbers = waiting, count()
        self._ahead: Sequence | None = None  # taken from the queue after `_next`
        self._next = self._take_next()

    def has_work(self) -> bool:
        """Whether any sequence is not finished; looks for new ones."""
        self._next = self._next or self._take_next()
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
        self._saved.begin_step()
        if limits.short_length:
            self._lengthen()
        if self._windowed:
            for sequence in self.running:
                if not sequence.in_flight:
                    self._drop_behind(sequence, sequence.computed)
        self._admit()
        share = -(-len(self.running) // micro_batches)  # leave the others for the micro-batches behind
        maximum = min(share, limits.max_sequences)
        budget = limits.max_tokens
        decoding = sum(sequence.left == 1 for sequence in self.running if not sequence.in_flight)
        chosen: list[tuple[Sequence, int]] = []
        coming: set[bytes] = set()  # keys of the blocks that this step fills
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
            if not decodes and self._share(sequence, coming):
                continue
            # Decoding goes first, but for the oldest: it always goes on.
            kept = 0 if decodes or limits.whole_prompts else min(decoding, maximum - len(chosen) - 1)
            allowed = max(budget - kept, int(not chosen))
            saves = not decodes and self._saved.can_save(sequence)
            wanted = sequence.save_at - sequence.computed if saves else sequence.left
            count = self._allocate(sequence, min(wanted, sequence.left, allowed)) if allowed else 0
            if count:
                self._saved.let_go(sequence.loads)  # later steps may drop what this one reads
                if saves and count == wanted:
                    sequence.saves = self._saved.save(sequence.block_key(sequence.save_at // KV_BLOCK - 1))
                self._count_shared(sequence)
                if self._shares and (sequence.computed + count) // KV_BLOCK > sequence.named:
                    coming.update(self._name_blocks(sequence, count))
                budget -= count
                chosen.append((sequence, count))
        for sequence, _ in chosen:
            sequence.in_flight = True
        if self._speculation is not None:
            self._draft(self._speculation, chosen, budget)
        return chosen

    def give_back(self, sequence: Sequence) -> None:
        """Release the blocks behind what is computed: of drafts that were not accepted, or of another sequence."""
        end = blocks_for(sequence.computed)
        for table in sequence.tables:
            kept = max(end - table.first, 0)
            self._pool.release(table.blocks[kept:])
            del table.blocks[kept:]

    def release(self, sequence: Sequence) -> None:
        """Take a finished sequence out, with its blocks and its slot, unless another one goes on in its place."""
        self.running.remove(sequence)
        heir = sequence.heir
        if heir is not None:
            heir.started = time.monotonic()
            position = heir.passed_over
            if heir.long == sequence.long and all(
                sequence.tables[group].first <= first_kept(position, window)
                for group, window in self._windowed
            ):
                heir.inherit(sequence)
                self.give_back(heir)
                insort(self.running, heir, key=_number)
            else:  # what it attends to is gone: it begins anew
                insort(self._preempted, heir, key=_number)
        self._clear(sequence)

    def _take_next(self) -> Sequence | None:
        """The first in the queue, which is taken from one by one: a job's sequences need not all be in memory.

        An iterator that has ended is asked again: a server's next request may have come.
        """
        sequence, self._ahead = self._ahead or self._take_one(), None
        last = sequence
        while last is not None and self._inherits and last.request.followed:
            following = self._take_one()
            if following is None or not following.goes_on_from(last):
                self._ahead = following
                break
            following.number = last.number
            last.heir = following
            last = following
        return sequence

    def _take_one(self) -> Sequence | None:
        sequence = next(self._waiting, None)
        if sequence is None:
            return None
        assert sequence.request.max_length <= self.limits.max_length, "a job refuses what could never run"
        sequence.number = next(self._numbers)
        sequence.tables = [BlockTable() for _ in self.limits.windows]
        if self._outgrown(sequence):
            sequence.lengthen()
        return sequence

    def _outgrown(self, sequence: Sequence) -> bool:
        """Whether a sequence should be long and is not yet."""
        return not sequence.long and 0 < self.limits.short_length < len(sequence.tokens)

    def _lengthen(self) -> None:
        """Let sequences that have outgrown the short factors begin again with the long ones, in their places."""
        for sequence in self.running:
            if not sequence.in_flight and self._outgrown(sequence):
                self._empty(sequence)
                sequence.lengthen()

    def _admit(self) -> None:
        """Admit preempted sequences, then waiting ones, while blocks suffice for their tokens and all others' next."""
        owed = growing = -1  # of the running ones; not known before one may join them
        while len(self.running) < self._max_running:
            self._next = self._next or self._take_next()
            sequence = self._preempted[0] if self._preempted else self._next
            if sequence is None:
                return
            if owed < 0:
                owed = sum(map(self._missing, self.running))
                growing = sum(map(self._growing, self.running))
            self._share(sequence)
            owed += self._missing(sequence)
            if self.running and owed + growing > self._pool.free:
                self._clear(sequence)
                return
            growing += self._growing(sequence)
            if self.limits.n_slots:
                sequence.slot = heappop(self._free_slots)
                sequence.save_at = self._saved.place_to_save(sequence) if self._shares else 0
            if self._preempted:
                del self._preempted[0]
            else:
                sequence.started = time.monotonic()
                self._next = None
            insort(self.running, sequence, key=_number)

    def _share(self, sequence: Sequence, coming: frozenset[bytes] | set[bytes] = frozenset()) -> bool:
        """Let a sequence skip blocks that another one has computed; True if it should wait for one of `coming`."""
        if not self._shares or sequence.computed % KV_BLOCK:
            return False
        # The last token is computed in any case, for the token after it.
        end = len(sequence.tokens) - 1
        if sequence.request.needs_all_rows:
            end = min(end, sequence.passed_over)
        own, last = sequence.computed // KV_BLOCK, end // KV_BLOCK
        shared, pool = own, self._pool
        while shared < last:
            key = sequence.block_key(shared)
            if key in coming or not all((group, key) in pool for group in self._full):
                break
            shared += 1
        while shared > own and not self._end_found(sequence, shared):
            shared -= 1
        if shared > own:
            self._drop_behind(sequence, shared * KV_BLOCK)
            for group, table in enumerate(sequence.tables):
                for index in range(table.end, shared):
                    block = pool.share((group, sequence.block_key(index)))
                    assert block is not None
                    table.blocks.append(block)
            sequence.computed, sequence.named = shared * KV_BLOCK, shared
            if self.limits.n_slots:
                self._saved.let_go(sequence.loads)
                sequence.loads = self._saved.take(sequence.block_key(shared - 1))
        if self.limits.n_slots:
            return self._saved.comes(sequence.block_key(index) for index in range(shared, last))
        return shared < last and sequence.block_key(shared) in coming

    def _end_found(self, sequence: Sequence, count: int) -> bool:
        """Whether a sequence can go on after its first `count` blocks.

        That needs saved states, and in groups with windows the blocks that are attended to.
        """
        if self.limits.n_slots and sequence.block_key(count - 1) not in self._saved:
            return False
        own = sequence.computed // KV_BLOCK
        return all(
            (group, sequence.block_key(index)) in self._pool
            for group, window in self._windowed
            for index in range(count - 1, max(first_kept(count * KV_BLOCK, window), own) - 1, -1)
        )

    def _drop_behind(self, sequence: Sequence, position: int) -> None:
        """Release blocks that neither the token at `position` nor any later one attends to."""
        for group, window in self._windowed:
            if dropped := sequence.tables[group].drop(first_kept(position, window)):
                self._pool.release(dropped)

    def _allocate(self, sequence: Sequence, count: int) -> int:
        """Allocate blocks for `count` more tokens, or for as many as possible; returns for how many."""
        tables, pool = sequence.tables, self._pool
        if not tables:
            return count
        end = tables[0].end
        if sequence.computed + count <= end * KV_BLOCK:
            return count
        if end * KV_BLOCK == sequence.computed:
            while pool.free < len(tables):
                if not self._preempt_after(sequence):
                    return 0
        end = min(blocks_for(sequence.computed + count), end + pool.free // len(tables))
        for table in tables:
            table.blocks.extend(pool.acquire() for _ in range(end - table.end))
        return min(count, end * KV_BLOCK - sequence.computed)

    def _draft(self, speculation: Speculation, chosen: list[tuple[Sequence, int]], rows: int) -> None:
        """Give the chosen sequences drafts of up to `rows` tokens together.

        They take no block that a sequence may need for its next token, and none that would send layers to disk.
        """
        rows = min(rows, DRAWN_ROWS - len(chosen))
        if rows <= 0 or not speculation.begin_step(len(chosen)):
            return
        rooms = [(sequence, room) for sequence, computes in chosen if (room := sequence.room(computes)) > 0]
        speculation.ask_model(rooms, rows)
        groups, pool = len(self.limits.windows), self._pool
        spare = min(pool.free, self.limits.blocks_in_memory - pool.used) // groups - len(self.running)
        for sequence, computes in chosen:
            end, tables = sequence.computed + computes, sequence.tables
            room = tables[0].end * KV_BLOCK - end + KV_BLOCK * max(spare, 0)
            most = min(rows, room, sequence.room(computes))
            if self.limits.short_length and not sequence.long:
                most = min(most, self.limits.short_length - end)
            if most <= 0:
                continue
            sequence.drafts = speculation.draft(sequence, most)
            rows -= len(sequence.drafts)
            more = blocks_for(end + len(sequence.drafts)) - tables[0].end
            for table in tables:
                table.blocks.extend(pool.acquire() for _ in range(more))
            spare -= max(more, 0)

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Preempt the youngest sequence behind `sequence` that has blocks; False if there is none."""
        for victim in reversed(self.running):
            if victim is sequence:
                return False
            if victim.tables[0].blocks and not victim.in_flight:
                self.running.remove(victim)
                self._clear(victim)
                insort(self._preempted, victim, key=_number)
                self.totals.preemptions += 1
                return True
        return False

    def _name_blocks(self, sequence: Sequence, count: int) -> Iterator[bytes]:
        """The keys of the blocks that the next `count` tokens fill, which can be found by them from now on.

        Those that drafts have filled since the last call are among them.
        """
        end = sequence.computed + count
        if sequence.heir is not None:  # which writes into the blocks behind
            end = min(end, sequence.passed_over)
        for index in range(sequence.named, end // KV_BLOCK):
            key = sequence.block_key(index)
            for group, table in enumerate(sequence.tables):
                if index >= table.first:
                    self._pool.name(table.blocks[index - table.first], (group, key))
            sequence.named = index + 1
            yield key

    def _count_shared(self, sequence: Sequence) -> None:
        """Only tokens that were never computed count: after a preemption a sequence may find its own blocks again."""
        if sequence.computed > sequence.reached:
            self.totals.shared_tokens += sequence.computed - sequence.reached
            sequence.reached = sequence.computed

    def _clear(self, sequence: Sequence) -> None:
        """Release all that a sequence has in the cache."""
        self._empty(sequence)
        if sequence.slot != NO_SLOT:
            heappush(self._free_slots, sequence.slot)
            sequence.slot = NO_SLOT

    def _empty(self, sequence: Sequence) -> None:
        """Release a sequence's blocks; it keeps its slot, and will be computed from its first token on."""
        for table in sequence.tables:
            self._pool.release(table.blocks)
        sequence.tables = [BlockTable() for _ in self.limits.windows]
        sequence.computed = sequence.named = 0
        self._saved.let_go(sequence.loads)
        sequence.loads = NO_SLOT

    def _missing(self, sequence: Sequence) -> int:
        """Blocks that a sequence still needs for the tokens it has."""
        total, missing = blocks_for(len(sequence.tokens)), 0
        for table, window in zip(sequence.tables, self.limits.windows, strict=True):
            needed = total - table.first
            if window:  # at once: what is attended to, and a step's tokens
                needed = min(needed, window_blocks(window) + blocks_for(self.limits.max_tokens))
            missing += max(needed - len(table.blocks), 0)
        return missing

    def _growing(self, sequence: Sequence) -> int:
        """The groups in which a sequence may come to need one more block than for the tokens it has."""
        if sequence.request.max_length <= blocks_for(len(sequence.tokens)) * KV_BLOCK:
            return 0
        return sum(
            not window or len(table.blocks) < window_blocks(window)
            for table, window in zip(sequence.tables, self.limits.windows, strict=True)
        )


def _number(sequence: Sequence) -> int:
    return sequence.number
