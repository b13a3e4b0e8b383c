"""Blocks are found by content, kept while somebody uses them, and reused in a sensible order."""

from __future__ import annotations

from mpillm.engine.blocks import BlockPool, content_key


def test_a_key_stands_for_all_tokens_before_it() -> None:
    first, other = content_key(b"", [1, 2]), content_key(b"", [1, 3])
    assert len(first) == 16
    assert content_key(b"", (1, 2)) == first != other
    assert content_key(first, [5, 6]) != content_key(other, [5, 6])


def test_a_block_is_kept_while_somebody_uses_it() -> None:
    pool = BlockPool(2)
    block = pool.acquire()
    pool.name(block, (0, b"a"))
    assert pool.share((0, b"a")) == block
    assert pool.share((0, b"b")) is None
    pool.release([block])
    assert (pool.used, pool.free) == (1, 1)
    pool.release([block])
    assert (pool.used, pool.free) == (0, 2)
    assert pool.share((0, b"a")) == block  # still there
    assert (pool.used, pool.free) == (1, 1)


def test_blocks_without_content_go_first_then_the_longest_idle() -> None:
    pool = BlockPool(4)
    blocks = [pool.acquire() for _ in range(4)]
    assert sorted(blocks) == [0, 1, 2, 3]
    for block, key in zip(blocks, (b"a", b"b", b"c"), strict=False):
        pool.name(block, (0, key))
    pool.release(blocks[:2])  # of these b goes before a, which begins more sequences
    pool.release(blocks[2:])
    assert [pool.acquire() for _ in range(4)] == [blocks[3], blocks[1], blocks[0], blocks[2]]
    assert [pool.share((0, key)) for key in (b"a", b"b", b"c")] == [None] * 3
    assert pool.free == 0


def test_of_two_blocks_with_one_content_the_first_is_found() -> None:
    pool = BlockPool(2)
    one, two = pool.acquire(), pool.acquire()
    pool.name(one, (0, b"a"))
    pool.name(two, (0, b"a"))
    pool.name(one, (0, b"b"))
    assert pool.share((0, b"a")) == one
    assert pool.share((0, b"b")) is None
    pool.release([two])
    assert pool.acquire() == two
