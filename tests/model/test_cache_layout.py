"""Groups of layers and the memory of their blocks: real models' patterns, on any cut into stages and shards."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mpillm.kernels import KV_BLOCK, BlockType
from mpillm.model.cache_layout import (
    blocks_needed,
    cache_layout,
    first_kept,
    groups_of,
    longest_sequence,
    rank_layouts,
    window_blocks,
)
from mpillm.model.cache_spec import LayerCache, SequenceState, TokenCache
from mpillm.model.kv import KVCache
from mpillm.partition import grid
from mpillm.partition.grid import Place
from tests.shapes import shape

F32 = BlockType.F32
# Gemma 3 27B: 10 full layers, 52 with a window.
GEMMA = [0 if layer % 6 == 5 else 1024 for layer in range(62)]
GPT_OSS = [128, 0] * 12


def kept(windows: list[int]) -> list[tuple[LayerCache, ...]]:
    return [(TokenCache(2, 8, 8, window),) for window in windows]


@pytest.mark.parametrize(
    ("windows", "groups"),
    [
        ([0] * 5, (0,)),
        ([64] * 5, (64,)),
        (GPT_OSS, (0, 128)),
        (GEMMA, (0, *[1024] * 6)),
        ([0] * 6 + [9] * 5, (0, 9)),  # about as many layers of each: two groups
        ([0, 9, 9, 20, 20, 20, 20], (0, 9, 9, 20, 20, 20, 20)),
    ],
)
def test_groups(windows: list[int], groups: tuple[int, ...]) -> None:
    found = groups_of(kept(windows))
    assert found.windows == groups
    assert [groups[group] for group in found.of_layers if group is not None] == windows
    sizes = np.bincount([group for group in found.of_layers if group is not None])
    assert len(sizes) == len(groups)
    assert sizes.min() >= 1


@pytest.mark.parametrize("stages", [1, 2, 4, 7])
@pytest.mark.parametrize("windows", [[0] * 28, GEMMA, GPT_OSS])
def test_layers_of_a_group_have_pools_of_their_own(windows: list[int], stages: int) -> None:
    config = shape(len(windows), 64, 8, 4, 8, 96, 100)
    layers = [
        replace(layer, mixer=replace(layer.mixer, window=window))
        for layer, window in zip(config.layers, windows, strict=True)
    ]
    config = replace(config, layers=tuple(layers), block=1)
    places = [Place(rank, stages, 2) for rank in range(2 * stages)]
    layouts = rank_layouts(config, places, "f32")
    one = 2 * 2 * 8 * KV_BLOCK * 4  # bytes of a layer's block: keys and values of two KV heads
    for place, layout in zip(places, layouts, strict=True):
        own = grid.stage_layers(config.n_layers, place)
        assert len(layout.tokens) == len(own)
        used = [(layer.group, layer.pool) for layer in layout.tokens if layer]
        assert len(set(used)) == len(own)
        counts = np.bincount([group for group, _ in used])
        assert len(layout.pools) == counts.max()
        assert layout.block_nbytes == len(layout.pools) * one
        assert layout.token_nbytes * KV_BLOCK == len(own) * one
        assert layout.windows == layouts[0].windows
        for group in set(windows):
            same = [
                int(counts[number])
                for number, window in enumerate(layout.windows[: len(counts)])
                if window == group
            ]
            assert max(same) - min(same) <= 1  # a stage has about as many layers of each group


def test_windows_hold_many_more_tokens() -> None:
    """In the memory of 62 layers' 32768 tokens, Gemma 3 has room for a sequence more than five times as long."""
    blocks = 62 * 32768 // KV_BLOCK // 10  # of ten pools
    windows = groups_of(kept(GEMMA)).windows
    assert longest_sequence(blocks, windows) > 5 * 32768
    assert longest_sequence(100, (0,)) == 100 * KV_BLOCK
    assert blocks_needed(32768, windows) < 1024 + 6 * 34


def test_what_a_window_touches() -> None:
    for window in range(1, 200):
        touched = {
            position // KV_BLOCK - first_kept(position, window) + 1
            for position in range(window, window + 100)
        }
        assert max(touched) == window_blocks(window)
    assert first_kept(10**6, 0) == 0


def test_widths_of_their_own_and_states() -> None:
    specs: list[tuple[LayerCache, ...]] = [
        (TokenCache(1, 24, 16),),  # a latent that serves as key and value
        (SequenceState(40), SequenceState(8)),
        (TokenCache(2, 8, 12, 40), SequenceState(16)),
        (TokenCache(1, 16, 24),),  # as many bytes as the layer before: they share a pool
        (TokenCache(1, 16, 24, 40),),
        (),
    ]
    groups = groups_of(specs)
    assert groups.windows == (0, 40)
    assert groups.of_layers == (0, None, 1, 0, 1, None)
    layout = cache_layout(specs, groups, range(6), F32)
    token = [4 * (24 + 16), 4 * 2 * (8 + 12), 4 * (16 + 24), 4 * (16 + 24)]
    assert layout.token_nbytes == sum(token)
    assert layout.block_nbytes == KV_BLOCK * (sum(token) - token[1])
    assert layout.states == (0, 48, 16, 0, 0, 0)
    assert layout.state_nbytes == 64
    cache = KVCache(layout, 5, 3)
    assert [array.shape for array in cache.acquire(0)] == [(5, 1, 24, KV_BLOCK), (5, 1, KV_BLOCK, 16)]
    assert [array.shape for array in cache.acquire(2)] == [(5, 2, 8, KV_BLOCK), (5, 2, KV_BLOCK, 12)]
    assert np.shares_memory(cache.acquire(2)[0], cache.acquire(3)[0])
    for one, other in pairwise([0, 2, 4]):
        assert not np.shares_memory(cache.acquire(one)[0], cache.acquire(other)[0])
    assert [cache.states(i).shape for i in range(3)] == [(3, 0), (3, 48), (3, 16)]
    assert cache_layout(specs, groups, range(1, 2), F32).pools == ()
