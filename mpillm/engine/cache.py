"""Allocates, shares and releases the blocks and slots that sequences hold in the cache."""

from __future__ import annotations

from heapq import heappop, heappush

from mpillm.engine.blocks import NO_SLOT, BlockPool, BlockTable
from mpillm.engine.limits import Limits, Totals
from mpillm.engine.saved_states import SavedStates
from mpillm.engine.sequence import Sequence
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_for, first_kept, window_blocks


class CacheAllocator:
    """Allocates a sequence's blocks, in all groups of layers at once, and its slot if the model has states.

    Followers compute steps in the order in which they were sent. So a block may be shared as soon as the step that
    computes it has been sent, and reused as soon as the last step that reads it has been sent. A sequence that would
    compute the same block in the same step waits. A prefix can be shared up to the end of a full block if all blocks
    are there to which the next token attends: those of the last `window` tokens in groups with a window, and all blocks
    in the other groups. In groups with a window, blocks that have left the window are released.

    If the model has states, a prefix is shared only where its states were saved too (`SavedStates`); a chunk ends
    where states are to be saved.
    """

    def __init__(self, limits: Limits, totals: Totals) -> None:
        self._limits, self._totals = limits, totals
        self._shares = limits.shares
        self._pool = BlockPool(limits.n_blocks, limits.blocks_in_memory)
        self._free_slots = list(range(limits.n_slots))  # a heap
        self._saved = SavedStates(limits.n_slots, limits.n_saved)
        self._full = [group for group, window in enumerate(limits.windows) if not window]
        self._windowed = [(group, window) for group, window in enumerate(limits.windows) if window]
        self._coming: set[bytes] = set()  # keys of the blocks that are filled by the step being scheduled

    @property
    def used(self) -> int:
        """The number of blocks that sequences hold."""
        return self._pool.used

    @property
    def free(self) -> int:
        """The number of blocks that can be allocated."""
        return self._pool.free

    @property
    def free_in_memory(self) -> int:
        """The number of blocks that can be allocated in each group of layers before layers are spilled to disk."""
        in_memory = self._limits.blocks_in_memory - self._pool.used
        return min(self._pool.free, in_memory) // len(self._limits.windows)

    def begin_step(self) -> None:
        """Begin to schedule the next step: blocks that the previous step computes can now be shared."""
        self._coming.clear()
        self._saved.begin_step()

    def missing(self, sequence: Sequence) -> int:
        """Return how many more blocks a sequence needs for its tokens."""
        total, missing = blocks_for(len(sequence.tokens)), 0
        for table, window in zip(sequence.tables, self._limits.windows, strict=True):
            needed = total - table.first
            if window:  # at a time it needs the blocks of its window and of the tokens of a step
                needed = min(needed, window_blocks(window) + blocks_for(self._limits.max_tokens))
            missing += max(needed - len(table.blocks), 0)
        return missing

    def growing(self, sequence: Sequence) -> int:
        """Return the number of groups in which a sequence may need a block beyond those of its present tokens."""
        if sequence.request.max_length <= blocks_for(len(sequence.tokens)) * KV_BLOCK:
            return 0
        return sum(
            not window or len(table.blocks) < window_blocks(window)
            for table, window in zip(sequence.tables, self._limits.windows, strict=True)
        )

    def assign_slot(self, sequence: Sequence) -> None:
        """Give an admitted sequence a slot for its states, if the model has states."""
        if self._limits.n_slots:
            sequence.slot = heappop(self._free_slots)
            sequence.save_at = self._saved.place_to_save(sequence) if self._shares else 0

    def allocate(self, sequence: Sequence, count: int) -> int:
        """Allocate blocks for up to `count` more tokens; return for how many there was room."""
        if not sequence.tables:
            return count
        end = sequence.tables[0].end
        if sequence.computed + count > end * KV_BLOCK:
            maximum = end + self._pool.free // len(sequence.tables)
            end = min(blocks_for(sequence.computed + count), maximum)
            self._extend(sequence, end)
        return min(count, end * KV_BLOCK - sequence.computed)

    def share(self, sequence: Sequence) -> bool:
        """Let a sequence use blocks that another sequence has computed.

        Return True if it should wait, because the step being scheduled computes more of its blocks.
        """
        if not self._shares or sequence.computed % KV_BLOCK:
            return False
        # The last token is always computed: its logits are needed.
        end = len(sequence.tokens) - 1
        if sequence.request.needs_all_rows:
            end = min(end, sequence.passed_over)
        own, last = sequence.computed // KV_BLOCK, end // KV_BLOCK
        shared, pool = own, self._pool
        while shared < last:
            key = sequence.block_key(shared)
            if key in self._coming or not all((group, key) in pool for group in self._full):
                break
            shared += 1
        while shared > own and not self._end_found(sequence, shared):
            shared -= 1
        if shared > own:
            self.drop_behind(sequence, shared * KV_BLOCK)
            for group, table in enumerate(sequence.tables):
                for index in range(table.end, shared):
                    block = pool.share((group, sequence.block_key(index)))
                    assert block is not None
                    table.blocks.append(block)
            sequence.computed, sequence.named = shared * KV_BLOCK, shared
            if self._limits.n_slots:
                self._saved.let_go(sequence.loads)
                sequence.loads = self._saved.take(sequence.block_key(shared - 1))
        if self._limits.n_slots:
            return self._saved.comes(sequence.block_key(index) for index in range(shared, last))
        return shared < last and sequence.block_key(shared) in self._coming

    def can_save(self, sequence: Sequence) -> bool:
        """Return whether the sequence's chunk should end at `save_at`, to save its states there."""
        return self._saved.can_save(sequence)

    def compute(self, sequence: Sequence, count: int, saves: bool) -> None:
        """Note that the step being scheduled computes `count` tokens, and then saves the states if `saves`."""
        self._saved.let_go(sequence.loads)  # later steps may overwrite the states that this one reads
        if saves:
            sequence.saves = self._saved.save(sequence.block_key(sequence.save_at // KV_BLOCK - 1))
        # Tokens that are computed for the first time; after a preemption a sequence may find its own blocks again.
        if sequence.computed > sequence.reached:
            self._totals.shared_tokens += sequence.computed - sequence.reached
            sequence.reached = sequence.computed
        if self._shares and (sequence.computed + count) // KV_BLOCK > sequence.named:
            self._name_blocks(sequence, count)

    def drop_behind(self, sequence: Sequence, position: int) -> None:
        """Release the blocks to which neither the token at `position` nor a later one attends."""
        for group, window in self._windowed:
            if dropped := sequence.tables[group].drop(first_kept(position, window)):
                self._pool.release(dropped)

    def give_back(self, sequence: Sequence) -> None:
        """Release the blocks after the computed tokens, which held rejected drafts or another sequence's tokens."""
        end = blocks_for(sequence.computed)
        for table in sequence.tables:
            kept = max(end - table.first, 0)
            self._pool.release(table.blocks[kept:])
            del table.blocks[kept:]

    def inherit(self, heir: Sequence, sequence: Sequence) -> bool:
        """Give the blocks of a finished sequence to `heir`; return False if blocks that it attends to are missing."""
        position = heir.passed_over
        if heir.long != sequence.long or any(
            sequence.tables[group].first > first_kept(position, window) for group, window in self._windowed
        ):
            return False
        heir.inherit(sequence)
        self.give_back(heir)
        return True

    def release(self, sequence: Sequence) -> None:
        """Release a sequence's blocks and its slot."""
        self.release_blocks(sequence)
        if sequence.slot != NO_SLOT:
            heappush(self._free_slots, sequence.slot)
            sequence.slot = NO_SLOT

    def release_blocks(self, sequence: Sequence) -> None:
        """Release a sequence's blocks but not its slot; it will be computed again from its first token."""
        for table in sequence.tables:
            self._pool.release(table.blocks)
        sequence.tables = [BlockTable() for _ in self._limits.windows]
        sequence.computed = sequence.named = 0
        self._saved.let_go(sequence.loads)
        sequence.loads = NO_SLOT

    def _extend(self, sequence: Sequence, end: int) -> None:
        """Allocate blocks up to index `end`; the caller knows that enough are free."""
        for table in sequence.tables:
            table.blocks.extend(self._pool.acquire() for _ in range(end - table.end))

    def _end_found(self, sequence: Sequence, count: int) -> bool:
        """Return whether a sequence can continue after its first `count` blocks.

        It needs saved states if the model has states, and the blocks of the window in groups with a window.
        """
        if self._limits.n_slots and sequence.block_key(count - 1) not in self._saved:
            return False
        own = sequence.computed // KV_BLOCK
        return all(
            (group, sequence.block_key(index)) in self._pool
            for group, window in self._windowed
            for index in range(count - 1, max(first_kept(count * KV_BLOCK, window), own) - 1, -1)
        )

    def _name_blocks(self, sequence: Sequence, count: int) -> None:
        """Register the blocks that the next `count` tokens fill, so that they are found from the next step on.

        Blocks that accepted drafts have filled since the last call are registered too.
        """
        end = sequence.computed + count
        if sequence.heir is not None:  # the heir will write into the blocks after them
            end = min(end, sequence.passed_over)
        for index in range(sequence.named, end // KV_BLOCK):
            key = sequence.block_key(index)
            for group, table in enumerate(sequence.tables):
                if index >= table.first:
                    self._pool.name(table.blocks[index - table.first], (group, key))
            sequence.named = index + 1
            self._coming.add(key)
