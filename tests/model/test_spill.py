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
from mpillm.model.config import ModelConfig
from mpillm.model.kv import KVCache, block_nbytes
from mpillm.model.spill import SpillFile, layers_in_file, layers_that_stay, most_blocks, runs
from mpillm.partition.grid import Place
from tests import shapes

ALONE = Place(0, 1, 1)


def shape(layers: int, head_dim: int) -> ModelConfig:
    return shapes.shape(layers, 64, 4, 2, head_dim, 96, 100)


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 200))
def test_as_many_blocks_as_pay(layers: int, room: int, traffic: int) -> None:
    def works(blocks: int) -> bool:
        stay = layers_that_stay(layers, room, blocks)
        if stay == layers:
            return layers * blocks <= room
        return (stay + spill.BUFFERS) * blocks <= room and layers_in_file(
            layers, room, blocks
        ) * blocks <= traffic

    most = most_blocks(layers, room, traffic)
    assert works(most)
    assert not any(works(blocks) for blocks in range(most + 1, room + 2))
    assert most_blocks(layers, room, 0) == room // layers  # nothing is streamed, or nothing may be spilled


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


@pytest.mark.parametrize("head_dim", [2, 16])  # of which only the second has blocks of whole pages
@pytest.mark.parametrize("layers", [3, 9])
def test_it_is_what_memory_would_be(layers: int, head_dim: int, tmp_path: Path) -> None:
    """Random steps on a cache that spills and on one that does not, with something to read and write in each layer."""
    made, rng = shape(layers, head_dim), np.random.default_rng(layers)
    block_bytes = block_nbytes(made, ALONE, BlockType.F32)
    in_memory, n_blocks = 8, 8 * layers // spill.BUFFERS
    budget = in_memory * block_bytes
    whole = KVCache(made, ALONE, n_blocks, BlockType.F32)
    with closing(KVCache(made, ALONE, n_blocks, BlockType.F32, budget, tmp_path)) as cache:
        assert list(tmp_path.iterdir()) == []  # it has no name
        filled: list[int] = []  # blocks in use that hold something
        for step in range(30):
            old = rng.permutation(filled)[: rng.integers(0, len(filled) + 1)].astype(np.int32)
            free = sorted(set(range(min(4 + step, n_blocks))) - set(filled))
            new = np.array(free[: rng.integers(0, 4)], np.int32)
            block = np.concatenate([old[: len(old) // 2], new])
            if not len(block):
                continue
            offset = np.concatenate([rng.integers(1, KV_BLOCK, len(old) // 2), np.zeros(len(new))]).astype(
                np.int32
            )
            for one in (cache, whole):
                one.begin(np.concatenate([old, new]), block, offset)
            for layer in range(layers):
                for ours, theirs in zip(cache.take(layer), whole.take(layer), strict=True):
                    np.testing.assert_array_equal(ours[old], theirs[old])
                    ours[block] = theirs[block] = rng.standard_normal((len(block), *ours.shape[1:]))
                cache.give(layer)
                whole.give(layer)
            filled = sorted({*filled, *block.tolist()})
            if len(filled) > 6:
                for gone in rng.permutation(filled)[:2].tolist():
                    filled.remove(gone)
        assert cache.spill is not None
        assert cache.spill.layers > 0
        assert cache.spill.counters.read > 0
        assert cache.spill.counters.written > 0
        assert cache.peak <= budget


@pytest.fixture
def small(tmp_path: Path) -> Iterator[KVCache]:
    made = shape(4, 16)
    budget = 2 * block_nbytes(made, ALONE, BlockType.F32)
    with closing(KVCache(made, ALONE, 4, BlockType.F32, budget, tmp_path)) as cache:
        yield cache


def pass_through(cache: KVCache) -> None:
    for layer in range(4):
        cache.take(layer)
        cache.give(layer)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_bytes_are_counted(small: KVCache) -> None:
    of_a_layer = block_nbytes(shape(4, 16), ALONE, BlockType.F32) // 4
    assert small.spill is not None

    def step(table: np.ndarray, block: np.ndarray, offset: np.ndarray) -> None:
        small.begin(table, block, offset)
        pass_through(small)

    step(ids(0, 1), ids(0, 1), ids(0, 0))
    assert (small.spill.layers, small.spill.counters.written) == (0, 0)
    step(ids(0, 1, 2, 3), ids(0, 2, 3), ids(1, 0, 0))  # all four layers leave with two blocks each
    small.spill.make_room(4, small._pools)
    small.spill._queue.submit(lambda: None).result()
    assert small.spill.counters.written == 4 * (2 + 3) * of_a_layer
    assert small.spill.counters.read == 4 * 2 * of_a_layer


def test_what_fails_is_said(small: KVCache, tmp_path: Path) -> None:
    small.begin(ids(0, 1, 2), ids(0, 1, 2), ids(0, 0, 0))
    pass_through(small)
    assert small.spill is not None
    small.spill._queue.submit(os.ftruncate, small.spill._file._file, 4096).result()
    small.begin(ids(0, 1, 2), ids(2), ids(1))
    with pytest.raises(Interrupted) as caught:
        pass_through(small)
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
        f"memory.spill_dir = {missing}: no file can be made there (No such file or directory); name a directory on a "
        "local disk of each node."
    )
    with pytest.raises(
        JobError, match=r"^memory.kv_spill: \d+ bytes cannot be had in .* bytes are free\); ask for less"
    ):
        SpillFile(tmp_path, 2**62, direct=True)
    assert list(tmp_path.iterdir()) == []
    if os.path.ismount("/dev/shm"):
        with pytest.raises(
            JobError, match=r"^memory.spill_dir = /dev/shm lies in memory itself; name a directory"
        ):
            SpillFile(Path("/dev/shm"), 4096, direct=False)
