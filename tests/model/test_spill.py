"""Layers on disk hold what they would hold in memory, within the budget; and what cannot be had or read is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.errors import Interrupted, JobError
from mpillm.kernels import KV_BLOCK, BlockType
from mpillm.model import spill
from mpillm.model.cache_layout import CacheLayout, cache_layout, groups_of
from mpillm.model.cache_spec import TokenCache
from mpillm.model.kv import GroupTables, KVCache, StateMoves
from mpillm.model.spill import maximum_blocks, nbytes_in_file, pools_in_file, runs
from mpillm.model.spill_file import SpillFile


def layout(caches: list[TokenCache]) -> CacheLayout:
    """Of a rank that has all layers."""
    specs = [(cache,) for cache in caches]
    return cache_layout(specs, groups_of(specs), range(len(specs)), BlockType.F32)


def tables(table: np.ndarray, block: np.ndarray) -> GroupTables:
    return GroupTables(table, np.zeros(len(block), np.int32), block)


SIZES = st.one_of(
    st.builds(lambda size, count: [size] * count, st.integers(1, 9), st.integers(1, 12)),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
)


@given(SIZES, st.integers(0, 200), st.integers(0, 900))
def test_as_many_blocks_as_pay(sizes: list[int], budget: int, traffic: int) -> None:
    def works(blocks: int) -> bool:
        leaving = pools_in_file(sizes, budget, blocks)
        stay = sum(sizes) - sum(sizes[pool] for pool in leaving)
        if not leaving:
            return stay * blocks <= budget
        held = (stay + spill.BUFFERS * max(sizes)) * blocks
        return held <= budget and nbytes_in_file(sizes, budget, blocks) <= traffic

    maximum = maximum_blocks(sizes, budget, traffic)
    assert works(maximum)
    assert not any(works(blocks) for blocks in range(maximum + 1, budget + 2))
    # Nothing is streamed, or nothing may be spilled.
    assert maximum_blocks(sizes, budget, 0) == budget // sum(sizes)


@given(SIZES, st.integers(0, 200))
def test_pools_leave_in_one_order(sizes: list[int], budget: int) -> None:
    before: list[int] = []
    for blocks in range(20):
        leaving = pools_in_file(sizes, budget, blocks)
        assert leaving[: len(before)] == before
        assert len(set(leaving)) == len(leaving)
        before = leaving


@given(st.sets(st.integers(0, 40)), st.integers(0, 3))
def test_runs(blocks: set[int], gap: int) -> None:
    made = runs(np.array(sorted(blocks), np.int32), gap)
    covered = [block for begin, end in made for block in range(begin, end)]
    assert set(covered) >= blocks
    assert len(covered) == len(set(covered))
    assert all(begin in blocks and end - 1 in blocks for begin, end in made)
    assert all(after[0] - before[1] > gap for before, after in pairwise(made))
    if not gap:
        assert set(covered) == blocks


@pytest.mark.parametrize(
    "caches",
    [
        [TokenCache(2, 2, 2)] * 3,
        [TokenCache(2, 16, 16)] * 9,  # blocks of whole pages
        [TokenCache(2, 16, 16, 40 * (i % 3 > 0)) for i in range(9)],  # three groups that share pools
        [TokenCache(2, 8 + 8 * (i % 2), 16, 40 * (i % 2)) for i in range(6)],  # two groups that do not
        [TokenCache(1 + i % 3, 4, 2 * i) for i in range(1, 8)],  # one group, blocks of all sizes
        [TokenCache(1, 24, 0)] * 5,  # latents: values are a part of the keys
    ],
)
def test_it_is_what_memory_would_be(caches: list[TokenCache], tmp_path: Path) -> None:
    """Random steps on a cache that spills and on one that does not, with something to read and write in each layer."""
    made, rng = layout(caches), np.random.default_rng(len(caches))
    largest = max(map(sum, made.pools))
    n_blocks = 4 * made.block_nbytes // largest // len(made.windows) * len(made.windows)
    budget = 8 * made.block_nbytes
    whole = KVCache(made, n_blocks)
    with closing(KVCache(made, n_blocks, 0, budget, tmp_path)) as cache:
        assert list(tmp_path.iterdir()) == []  # it has no name
        filled: list[list[int]] = [[] for _ in made.windows]  # blocks in use that hold something, by group
        for step in range(30):
            groups = []
            count = int(rng.integers(0, 4))
            free = sorted(set(range(min(4 + step, n_blocks))) - {block for one in filled for block in one})
            count = min(count, len(free) // len(filled))
            shuffled = rng.permutation(free[: count * len(filled)]).astype(np.int32)
            kept = min(map(len, filled))
            kept = int(rng.integers(0, kept + 1))
            offset = np.concatenate([rng.integers(1, KV_BLOCK, kept // 2), np.zeros(count)]).astype(np.int32)
            if not len(offset):
                continue
            for group, blocks in enumerate(filled):
                old = rng.permutation(blocks)[:kept].astype(np.int32)
                new = shuffled[group * count : (group + 1) * count]
                groups.append(
                    (old, tables(np.concatenate([old, new]), np.concatenate([old[: kept // 2], new])))
                )
            for one in (cache, whole):
                one.begin([table for _, table in groups], offset, StateMoves())
            for layer in range(len(caches)):
                old, table = groups[whole.group_of(layer)]
                for ours, theirs in zip(cache.acquire(layer), whole.acquire(layer), strict=True):
                    np.testing.assert_array_equal(ours[old], theirs[old])
                    ours[table.block] = theirs[table.block] = rng.standard_normal(
                        (len(table.block), *ours.shape[1:])
                    )
                cache.release(layer)
                whole.release(layer)
            for (_, table), blocks in zip(groups, filled, strict=True):
                blocks[:] = sorted({*blocks, *table.block.tolist()})
                if len(blocks) > 6:
                    for gone in rng.permutation(blocks)[:2].tolist():
                        blocks.remove(gone)
        assert cache.spill is not None
        assert cache.spill.layers > 0
        assert cache.spill.counters.read > 0
        assert cache.spill.counters.written > 0
        assert cache.peak <= budget


SMALL = layout([TokenCache(2, 16, 16)] * 4)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[KVCache]:
    with closing(KVCache(SMALL, 4, 0, 2 * SMALL.block_nbytes, tmp_path)) as cache:
        yield cache


def pass_through(cache: KVCache, table: np.ndarray, block: np.ndarray, offset: np.ndarray) -> None:
    cache.begin([tables(table, block)], offset, StateMoves())
    for layer in range(4):
        cache.acquire(layer)
        cache.release(layer)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_bytes_are_counted(small: KVCache) -> None:
    of_a_layer = SMALL.block_nbytes // 4
    assert small.spill is not None
    pass_through(small, ids(0, 1), ids(0, 1), ids(0, 0))
    assert (small.spill.layers, small.spill.counters.written) == (0, 0)
    # All four layers leave with two blocks each.
    pass_through(small, ids(0, 1, 2, 3), ids(0, 2, 3), ids(1, 0, 0))
    small.spill._queue.submit(lambda: None).result()
    assert small.spill.counters.written == 4 * (2 + 3) * of_a_layer
    assert small.spill.counters.read == 4 * 2 * of_a_layer


def test_what_fails_is_said(small: KVCache, tmp_path: Path) -> None:
    pass_through(small, ids(0, 1, 2), ids(0, 1, 2), ids(0, 0, 0))
    assert small.spill is not None
    small.spill._queue.submit(os.ftruncate, small.spill._file._file, 4096).result()
    with pytest.raises(Interrupted) as caught:
        pass_through(small, ids(0, 1, 2), ids(2), ids(1))
    message = str(caught.value)
    assert message.startswith(f"The KV cache in {tmp_path} could not be read (it ended after ")
    assert message.endswith(
        "bytes); finished requests are safe, so run the same command again, with another memory.spill_dir if that "
        "disk is broken."
    )
    assert caught.value.exit_code == 75


def test_where_no_file_can_be_is_said(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(JobError) as caught:
        SpillFile(missing, 4096, direct=True)
    assert str(caught.value) == (
        f"memory.spill_dir = {missing}: a file cannot be created there (No such file or directory); give a "
        "directory on a local disk of each node."
    )
    with pytest.raises(
        JobError, match=r"^memory.kv_spill: \d+ bytes cannot be allocated in .* bytes are free\); lower it"
    ):
        SpillFile(tmp_path, 2**62, direct=True)
    assert list(tmp_path.iterdir()) == []
    if os.path.ismount("/dev/shm"):
        with pytest.raises(JobError, match=r"^memory.spill_dir = /dev/shm is in memory; give a directory"):
            SpillFile(Path("/dev/shm"), 4096, direct=False)
