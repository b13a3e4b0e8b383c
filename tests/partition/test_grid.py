"""The grid: every slice is owned once, panels nest, impossible layouts are refused by name."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.errors import LayoutError
from mpillm.model.config import ModelConfig
from mpillm.partition import grid
from mpillm.partition.grid import Axis, Place, vocab_axis
from tests.shapes import columns, heads, kv_heads, shape, widths

SMOLLM2 = shape(30, 576, 9, 3, 64, 1536, 49152)
LLAMA_1B = shape(16, 2048, 32, 8, 64, 8192, 128256)
TINY = shape(3, 32, 4, 2, 8, 48, 97, unit=1)
QWEN3_MOE = shape(48, 2048, 32, 4, 128, 6144, 151936, n_experts=128, moe_intermediate=768)
MIXTRAL = shape(32, 4096, 32, 8, 128, 14336, 32000, n_experts=8, moe_intermediate=14336)


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    shared = draw(st.integers(1, 9))
    experts = draw(st.sampled_from([0, 4]))
    return shape(
        n_layers=draw(st.integers(1, 40)),
        hidden=draw(st.integers(8, 4096)),
        n_heads=shared * draw(st.integers(1, 8)),
        n_kv_heads=shared,
        head_dim=draw(st.sampled_from([2, 8, 16, 48, 64, 80, 128])),
        intermediate=draw(st.integers(1, 9000)),
        vocab=draw(st.integers(1, 60000)),
        n_experts=experts,
        moe_intermediate=draw(st.integers(1, 2000)) if experts else 0,
        unit=draw(st.sampled_from([1, 32])),
    )


def powers_up_to(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length()) if 1 << i <= limit]


def assert_partition(ranges: list[range], total: int) -> None:
    assert all(len(part) for part in ranges)
    assert [i for part in ranges for i in part] == list(range(total))


@given(shapes(), st.integers(1, 4))
@settings(max_examples=60)
def test_every_slice_is_owned_by_one_shard(model: ModelConfig, stages: int) -> None:
    for shards in powers_up_to(model.max_shards):
        for stage in range(stages):
            places = [Place(stage * shards + s, stages, shards) for s in range(shards)]
            assert_partition([heads(model).units(p) for p in places], model.layers[0].mixer.n_heads)
            assert_partition([vocab_axis(model.vocab).units(p) for p in places], model.vocab)
            for width in widths(model):
                assert_partition([columns(model, width).units(p) for p in places], width)


@given(shapes())
@settings(max_examples=60)
def test_kv_heads_are_exactly_those_the_query_heads_read(model: ModelConfig) -> None:
    group = model.layers[0].mixer.n_heads // model.layers[0].mixer.n_kv_heads
    for shards in powers_up_to(model.max_shards):
        for s in range(shards):
            place = Place(s, 1, shards)
            needed = {head // group for head in heads(model).units(place)}
            assert set(kv_heads(model).units(place)) == needed


@given(shapes())
@settings(max_examples=60)
def test_panels_nest_and_are_whole_units(model: ModelConfig) -> None:
    of_heads = tuple(bound * model.layers[0].mixer.head_dim for bound in heads(model).bounds)
    kinds = [of_heads, vocab_axis(model.vocab).bounds, *(columns(model, w).bounds for w in widths(model))]
    for bounds in (kinds[0], *kinds[2:]):
        assert all(bound % model.block == 0 for bound in bounds[:-1])
    for bounds in kinds:
        count = len(bounds) - 1
        assert count in (1, 2, 4, 8)
        assert all(a < b for a, b in itertools.pairwise(bounds))
        for shards in powers_up_to(count):
            joined = [0]
            for s in range(shards):
                own = Axis(bounds).own_panels(Place(s, 1, shards))
                assert own[0] == 0
                assert len(own) - 1 == count // shards
                joined += [joined[-1] + bound for bound in own[1:]]
            assert tuple(joined) == bounds


@given(st.integers(1, 5000), st.sampled_from([1, 2, 16, 32]), st.sampled_from([1, 2, 4, 8]))
def test_fewer_panels_are_unions_of_more(total: int, unit: int, count: int) -> None:
    fine = grid.panel_bounds(total, unit, 8)
    assert grid.panel_bounds(total, unit, count) == fine[:: 8 // count]
    assert fine[0] == 0
    assert fine[-1] == total


@given(shapes(), st.integers(1, 6))
@settings(max_examples=60)
def test_stages_hold_every_layer_once_and_nearly_as_many_each(model: ModelConfig, stages: int) -> None:
    stages = min(stages, model.n_layers)
    parts = [grid.stage_layers(model.n_layers, Place(s, stages, 1)) for s in range(stages)]
    assert_partition(parts, model.n_layers)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_thirty_layers_on_four_stages() -> None:
    assert [grid.stage_layers(SMOLLM2.n_layers, Place(r, 4, 1)) for r in range(4)] == [
        range(8), range(8, 16), range(16, 23), range(23, 30)]  # fmt: skip


def test_place() -> None:
    place = Place(5, 3, 2)
    assert (place.stage, place.shard, place.size) == (2, 1, 6)
    assert place.is_last_stage
    assert not place.is_first_stage
    with pytest.raises(AssertionError):
        Place(6, 3, 2)


def test_smollm2_panels() -> None:
    assert heads(SMOLLM2).bounds == (0, 1, 2, 3, 4, 5, 6, 7, 9)
    assert columns(SMOLLM2, 1536).bounds == tuple(range(0, 1537, 192))
    own = [heads(SMOLLM2).units(Place(s, 1, 4)) for s in range(4)]
    assert own == [range(2), range(2, 4), range(4, 6), range(6, 9)]
    assert [list(kv_heads(SMOLLM2).units(Place(s, 1, 4))) for s in range(4)] == [[0], [0, 1], [1], [2]]


@pytest.mark.parametrize(("ranks", "expected"), [
    (1, [(1, 1)]),
    (2, [(1, 2), (2, 1)]),
    (3, [(3, 1)]),
    (4, [(1, 4), (2, 2), (4, 1)]),
    (6, [(3, 2), (6, 1)]),
    (8, [(1, 8), (2, 4), (4, 2), (8, 1)]),
])  # fmt: skip
def test_smollm2_layouts(ranks: int, expected: list[tuple[int, int]]) -> None:
    assert grid.layouts(SMOLLM2, ranks) == expected
    assert grid.choose(SMOLLM2, ranks) == expected[0]


def test_shards_may_outnumber_kv_heads() -> None:
    assert QWEN3_MOE.max_shards == 8
    kv = [list(kv_heads(QWEN3_MOE).units(Place(s, 1, 8))) for s in range(8)]
    assert kv == [[0], [0], [1], [1], [2], [2], [3], [3]]


def test_tiny_shapes() -> None:
    assert TINY.max_shards == 4
    assert heads(TINY).bounds == (0, 1, 2, 3, 4)
    assert columns(TINY, 48).bounds == (0, 6, 12, 18, 24, 30, 36, 42, 48)
    assert columns(TINY, 48).own_panels(Place(3, 1, 4)) == (0, 6, 12)
    assert vocab_axis(TINY.vocab).bounds[-1] == 97
    quantised = shape(3, 32, 4, 2, 8, 48, 97, unit=32)  # four heads make one block of 32: nothing to cut
    assert quantised.max_shards == 1
    assert heads(quantised).bounds == (0, 4)
    assert columns(quantised, 48).bounds == (0, 32, 48)


def test_heads_narrower_than_a_block_are_cut_in_groups() -> None:
    model = shape(2, 64, 12, 4, 80, 640, 512)
    assert heads(model).bounds == (0, 2, 6, 8, 12)  # 2 x 80 columns = 5 blocks; six units
    assert math.lcm(80, 32) == 2 * 80


def test_moe_experts_limit_the_shards() -> None:
    assert MIXTRAL.max_shards == 8
    narrow = shape(4, 256, 8, 8, 32, 1024, 512, n_experts=4, moe_intermediate=64)
    assert narrow.max_shards == 2
    assert columns(narrow, 64).units(Place(1, 1, 2)) == range(32, 64)
    assert columns(narrow, 1024).units(Place(1, 1, 2)) == range(512, 1024)
    dense = shape(4, 256, 8, 8, 32, 1024, 512, n_experts=0, moe_intermediate=64)
    assert dense.max_shards == 8


@pytest.mark.parametrize(("ranks_per_host", "expected"), [
    (None, (1, 8)),
    ((8,), (1, 8)),
    ((4, 4), (2, 4)),
    ((2, 2, 2, 2), (4, 2)),
    ((1, 1, 1, 1, 1, 1, 1, 1), (8, 1)),
    ((2, 4, 2), (4, 2)),
    ((3, 5), (8, 1)),
])  # fmt: skip
def test_auto_keeps_shard_groups_within_a_host(
    ranks_per_host: tuple[int, ...] | None, expected: tuple[int, int]
) -> None:
    assert grid.choose(LLAMA_1B, 8, ranks_per_host=ranks_per_host) == expected


def test_auto_crosses_hosts_when_nothing_else_works() -> None:
    assert grid.choose(TINY, 4, ranks_per_host=(1, 1, 1, 1)) == (1, 4)  # three layers: no four stages
    assert grid.choose(LLAMA_1B, 8, shards=8, ranks_per_host=(4, 4)) == (1, 8)
    assert grid.choose(LLAMA_1B, 8, stages=2, ranks_per_host=(2, 2, 2, 2)) == (2, 4)


def test_what_is_given_is_kept() -> None:
    assert grid.choose(SMOLLM2, 8, stages=4) == (4, 2)
    assert grid.choose(SMOLLM2, 8, shards=1) == (8, 1)
    assert grid.choose(SMOLLM2, 8, 2, 4) == (2, 4)


@pytest.mark.parametrize(("model", "ranks", "asked", "words"), [
    (SMOLLM2, 6, {"stages": 2}, r"8 shards cannot be laid out on 6 ranks as 2 stages \(ranks"),
    (SMOLLM2, 6, {"stages": 2}, r"what works: 3 stages x 2 shards, 6 stages x 1 shard\. Change \[layout\]"),
    (SMOLLM2, 4, {"stages": 2, "shards": 8}, r"as 2 stages x 8 shards .*works: 1 stage x 4 shards, 2 s"),
    (SMOLLM2, 4, {"shards": 3}, r"on 4 ranks as 3 shards .*what works: 1 stage x 4 shards"),
    (TINY, 5, {}, r"with 3 layers .* on 5 ranks; the nearest that work: 4 as 1 stage x 4 shards"),
    (SMOLLM2, 31, {}, r"on 31 ranks; the nearest that work: 30 as .*; 32 as 4 stages x 8 shards"),
    (SMOLLM2, 500, {}, r"on 500 ranks; the nearest that work: 240 as 30 stages x 8 shards\.$"),
])  # fmt: skip
def test_impossible_layouts_say_what_works(
    model: ModelConfig, ranks: int, asked: dict[str, int], words: str
) -> None:
    with pytest.raises(LayoutError, match=words):
        grid.choose(model, ranks, asked.get("stages", "auto"), asked.get("shards", "auto"))


@pytest.mark.parametrize(("model", "ranks", "shards", "same_shards", "expected"), [
    (LLAMA_1B, 7, 2, False, (7, 1)),  # all that are left
    (LLAMA_1B, 7, 2, True, (3, 2)),  # the same numbers on the Q8_0 wire, and one rank left over
    (LLAMA_1B, 6, 2, False, (3, 2)),
    (LLAMA_1B, 6, 4, False, (3, 2)),
    (LLAMA_1B, 3, 4, True, (3, 1)),  # four shards are no more
    (TINY, 7, 4, False, (3, 2)),
    (TINY, 1, 4, True, (1, 1)),
])  # fmt: skip
def test_the_layout_after_a_loss(
    model: ModelConfig, ranks: int, shards: int, same_shards: bool, expected: tuple[int, int]
) -> None:
    assert grid.choose_fewer(model, ranks, shards, same_shards) == expected


@pytest.mark.parametrize(
    ("seconds", "extra", "maximum", "counts"),
    [
        ([1.0, 1.0], [0.0, 0.0], [9, 9], (5, 5)),
        ([1.0, 4.0], [0.0, 0.0], [9, 9], (8, 2)),
        ([1.0, 1.0], [0.0, 4.0], [9, 9], (7, 3)),  # the last one has the LM head to compute
        ([1.0, 4.0], [0.0, 0.0], [6, 9], (6, 4)),
        ([1.0, 100.0], [0.0, 0.0], [10, 10], (9, 1)),  # none goes without
        ([1.0, 1.0], [0.0, 0.0], [2, 2], (5, 5)),  # there is too little memory whatever is done
    ],
)
def test_layers_by_speed(
    seconds: list[float], extra: list[float], maximum: list[int], counts: tuple[int, ...]
) -> None:
    assert grid.layers_by_speed(10, seconds, extra, maximum) == counts
    parts = [grid.stage_layers(10, Place(stage, 2, 1, layers=counts)) for stage in range(2)]
    assert [len(part) for part in parts] == list(counts)
    assert [layer for part in parts for layer in part] == list(range(10))
