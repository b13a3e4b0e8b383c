"""Reference counts and contents of KV blocks; full blocks are found again by their content.

The key of a full block is a hash of its tokens and of the key of the block before it. So it identifies all tokens up to
the end of the block with their positions, the adapter of the sequence, and whether it is long (LongRoPE). Together with
the group of layers, these determine the keys and values in the block. Only full blocks are shared, and full blocks are
not written to, so no block is ever copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush


def first_key(adapter: int, long: bool = False) -> bytes:
    """Return the key before the first block: it stands for the adapter's number and whether the sequence is long."""
    return (array("i", [adapter]).tobytes() if adapter else b"") + (b"long" if long else b"")


def content_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key (16 bytes) of a full block with `tokens`; `before` is the previous block's key, or `first_key`."""
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


NO_SLOT = -1  # the slot of a sequence without states

Content = tuple[int, bytes]  # a group of layers, and a content key


class BlockPool:
    """The KV blocks by number; the numbers are the same on every rank.

    A released block keeps its content until it is reused. Blocks are acquired in this order: empty blocks by number,
    then the block that has been idle for longest, and at last the empty blocks beyond `in_memory`.
    """

    def __init__(self, n_blocks: int, in_memory: int | None = None) -> None:
        self._users = [0] * n_blocks
        self._contents: list[Content | None] = [None] * n_blocks
        self._by_content: dict[Content, int] = {}
        self._empty = list(range(n_blocks))  # a heap
        self._in_memory = n_blocks if in_memory is None else in_memory
        self._idle: dict[int, None] = {}  # unused blocks with content, the longest idle first

    @property
    def free(self) -> int:
        """The number of blocks that can be acquired."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """The number of blocks in use."""
        return len(self._users) - self.free

    def acquire(self) -> int:
        """Take a free block for new content."""
        if self._empty and (self._empty[0] < self._in_memory or not self._idle):
            block = heappop(self._empty)
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            content = self._contents[block]
            assert content is not None
            del self._by_content[content]
            self._contents[block] = None
        self._users[block] = 1
        return block

    def __contains__(self, content: Content) -> bool:
        return content in self._by_content

    def share(self, content: Content) -> int | None:
        """Add a user to the block with this content and return it; None if there is none."""
        block = self._by_content.get(content)
        if block is not None:
            self._idle.pop(block, None)
            self._users[block] += 1
        return block

    def name(self, block: int, content: Content) -> None:
        """Register the content of a block, unless another block is registered with the same content."""
        if self._contents[block] is None and content not in self._by_content:
            self._contents[block] = content
            self._by_content[content] = block

    def release(self, blocks: Iterable[int]) -> None:
        """Remove a user from each of these blocks, in the sequence's order; its last blocks are reused first."""
        for block in reversed(list(blocks)):
            self._users[block] -= 1
            if not self._users[block]:
                if self._contents[block] is None:
                    heappush(self._empty, block)
                else:
                    self._idle[block] = None


class BlockTable:
    """A sequence's blocks in one group of layers, in the order of its tokens; those from `first` to `end` are kept."""

    def __init__(self) -> None:
        self.first = 0
        self.blocks: list[int] = []

    @property
    def end(self) -> int:
        """One more than the index of the last block."""
        return self.first + len(self.blocks)

    def drop(self, first: int) -> list[int]:
        """Remove the blocks before index `first`, and return them."""
        dropped = self.blocks[: first - self.first] if first > self.first else []
        del self.blocks[: len(dropped)]
        self.first = max(first, self.first)
        return dropped
