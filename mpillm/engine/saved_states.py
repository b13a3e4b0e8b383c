"""Saved states of prefixes, each in its own slot; sequences with the same prefix continue from them.

The state of a sequence changes with every token, so a prefix can be shared only at a position where its states were
saved. Saved states take as much memory as those of a running sequence, so they are saved when a second sequence has the
prefix: it computes the prefix again, and its states at the end of the last common block are saved for later sequences.
If no slot is free, the least recently used states are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mpillm.engine.blocks import NO_SLOT, BlockPool
from mpillm.engine.sequence import Sequence
from mpillm.kernels import KV_BLOCK

KNOWN = 2**16  # keys of earlier sequences' blocks that are remembered


class SavedStates:
    """The states in slots `first` to `first + count - 1`, by the key of the prefix's last block."""

    def __init__(self, first: int, count: int) -> None:
        self._first = first
        self._pool = BlockPool(count)
        self._coming: set[bytes] = set()  # saved by the step being scheduled
        self._known: dict[bytes, None] = {}  # keys of earlier sequences' blocks, the most recently used last

    def begin_step(self) -> None:
        """Begin to schedule the next step: states that the previous step saves can now be used."""
        self._coming.clear()

    def __contains__(self, key: bytes) -> bool:
        return (0, key) in self._pool and key not in self._coming

    def comes(self, keys: Iterable[bytes]) -> bool:
        """Return whether the step being scheduled saves the states of one of these prefixes."""
        return any(key in self._coming for key in keys)

    def take(self, key: bytes) -> int:
        """Return the slot of saved states, and keep them until `let_go`."""
        index = self._pool.share((0, key))
        assert index is not None
        return self._first + index

    def let_go(self, slot: int) -> None:
        """Allow states that were taken to be dropped: they have been read, or will not be."""
        if slot != NO_SLOT:
            self._pool.release([slot - self._first])

    def save(self, key: bytes) -> int:
        """Return the slot in which the step being scheduled saves states."""
        index = self._pool.acquire()
        self._pool.name(index, (0, key))
        self._pool.release([index])
        self._coming.add(key)
        return self._first + index

    def place_to_save(self, sequence: Sequence) -> int:
        """Return how many tokens, in whole blocks, a sequence has in common with an earlier one; remember its blocks.

        The last token does not count, because it is always computed.
        """
        keys = [sequence.block_key(index) for index in range((len(sequence.tokens) - 1) // KV_BLOCK)]
        common = next((index for index, key in enumerate(keys) if key not in self._known), len(keys))
        for key in keys:
            self._known.pop(key, None)
            self._known[key] = None
        for key in list(self._oldest(len(self._known) - KNOWN)):
            del self._known[key]
        return common * KV_BLOCK

    def can_save(self, sequence: Sequence) -> bool:
        """Return whether the sequence's states at `save_at` should be saved, and a slot can be had."""
        if sequence.computed >= sequence.save_at or not self._pool.free:
            return False
        return (0, sequence.block_key(sequence.save_at // KV_BLOCK - 1)) not in self._pool

    def _oldest(self, count: int) -> Iterator[bytes]:
        for _, key in zip(range(count), self._known, strict=False):
            yield key
