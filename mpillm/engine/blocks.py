"""Which KV block is whose and what it holds; full blocks are found again by their content.

A full block's key is a hash chain: of its own tokens and of the key of the block before it, so it stands for all
tokens up to the block's end, what positions those are, the sequence's adapter, and whether it is long (LongRoPE). Keys
and values of a token depend on nothing else but on the group of layers that they belong to. Only full blocks are ever
shared, and nobody writes into a full block, so none needs to be copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush


def first_key(adapter: int, long: bool = False) -> bytes:
    """What stands before the first block: the number of the sequence's adapter, if any, and whether it is long."""
    return (array("i", [adapter]).tobytes() if adapter else b"") + (b"long" if long else b"")


def content_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key, 16 bytes, of a full block with `tokens`; `before` is the key of the block before it, or `first_key`."""
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


NO_SLOT = -1  # of a sequence without states

Content = tuple[int, bytes]  # a group of layers, and a content key


class BlockPool:
    """The numbers of all KV blocks, the same ones on every rank.

    A released block keeps its content while others are free: empty blocks are acquired first, the lowest of them, and
    then the one that has been idle for longest. Only then those that do not fit into memory are.
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
        """A free block for a new content."""
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
        """The block with this content, which the caller then uses too; None if there is none."""
        block = self._by_content.get(content)
        if block is not None:
            self._idle.pop(block, None)
            self._users[block] += 1
        return block

    def name(self, block: int, content: Content) -> None:
        """Let a block be found by its content, unless another one with the same content is."""
        if self._contents[block] is None and content not in self._by_content:
            self._contents[block] = content
            self._by_content[content] = block

    def release(self, blocks: Iterable[int]) -> None:
        """One user less for each of a sequence's blocks, in its order; its last ones will be the first to be reused."""
        for block in reversed(list(blocks)):
            self._users[block] -= 1
            if not self._users[block]:
                if self._contents[block] is None:
                    heappush(self._empty, block)
                else:
                    self._idle[block] = None


class BlockTable:
    """A sequence's blocks in one group of layers, in the order of positions: numbers `first` to `end` are kept."""

    def __init__(self) -> None:
        self.first = 0
        self.blocks: list[int] = []

    @property
    def end(self) -> int:
        """The number behind the last block."""
        return self.first + len(self.blocks)

    def drop(self, first: int) -> list[int]:
        """Keep blocks from number `first` on; returns those before it."""
        dropped = self.blocks[: first - self.first] if first > self.first else []
        del self.blocks[: len(dropped)]
        self.first = max(first, self.first)
        return dropped
