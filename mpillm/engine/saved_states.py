"""States after prefixes, each in a slot of its own, from which sequences that begin alike go on.

The state of a sequence changes with every token, so a prefix can be shared only where its states were saved. Each
takes as much memory as a running sequence's, so they are saved only where a second sequence shows that it is worth it:
it computes what it has in common with an earlier one again, and its states there, at the end of a block, are saved.
Those that come later begin there. Where no slot is left, the states that have not been used for longest are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mpillm.engine.blocks import NO_SLOT, BlockPool
from mpillm.engine.sequence import Sequence
from mpillm.kernels import KV_BLOCK

KNOWN = 2**16  # blocks of earlier sequences that are remembered


class SavedStates:
    """What is saved in slots `first`, ..., `first + count - 1`, by the key of the prefix's last block."""

    def __init__(self, first: int, count: int) -> None:
        self._first = first
        self._pool = BlockPool(count)
        self._coming: set[bytes] = set()  # saved by the step that is being made
        self._known: dict[bytes, None] = {}  # keys of earlier sequences' blocks, those used last at the end

    def begin_step(self) -> None:
        """What was saved before can be used from now on."""
        self._coming.clear()

    def __contains__(self, key: bytes) -> bool:
        return (0, key) in self._pool and key not in self._coming

    def comes(self, keys: Iterable[bytes]) -> bool:
        """Whether the step that is being made saves the states after one of these prefixes."""
        return any(key in self._coming for key in keys)

    def take(self, key: bytes) -> int:
        """The slot of saved states, which are not dropped before `let_go`."""
        index = self._pool.share((0, key))
        assert index is not None
        return self._first + index

    def let_go(self, slot: int) -> None:
        """States that were taken have been read, or will not be."""
        if slot != NO_SLOT:
            self._pool.release([slot - self._first])

    def save(self, key: bytes) -> int:
        """The slot in which the step that is being made saves states."""
        index = self._pool.acquire()
        self._pool.name(index, (0, key))
        self._pool.release([index])
        self._coming.add(key)
        return self._first + index

    def place_to_save(self, sequence: Sequence) -> int:
        """How many tokens a sequence has in common with an earlier one, in whole blocks; remembers the sequence.

        Its last token does not count, for it is computed in any case.
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
        """Whether the states at the sequence's `save_at` are worth a slot, and there is one."""
        if sequence.computed >= sequence.save_at or not self._pool.free:
            return False
        return (0, sequence.block_key(sequence.save_at // KV_BLOCK - 1)) not in self._pool

    def _oldest(self, count: int) -> Iterator[bytes]:
        for _, key in zip(range(count), self._known, strict=False):
            yield key
