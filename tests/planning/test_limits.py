"""What a step takes on: fixed numbers where it costs no pass over the disk, else what memory allows."""

from __future__ import annotations

from typing import Any

import pytest

from mpillm.kernels import KV_BLOCK, BlockType
from mpillm.model.activations import Activations
from mpillm.model.cache_layout import CacheLayout, cache_layout, groups_of, rank_layouts
from mpillm.model.cache_spec import SequenceState, TokenCache
from mpillm.partition.grid import Place
from mpillm.planning.input_needs import NO_INPUT, InputNeeds
from mpillm.planning.limits import (
    MAX_TOKENS,
    CacheCapacity,
    cache_capacity,
    cache_in_memory,
    limits,
    step_description,
    step_size,
)
from mpillm.spec import BatchSection, MemorySection, OutputSection, Spec
from tests.shapes import shape

LLAMA_8B = shape(32, 4096, 32, 8, 128, 14_336, 128_256)
ROWS = Activations(LLAMA_8B)
ALONE = [Place(0, 1, 1)]
GIB = 2**30


def spec(weights: int | str = "all", kv: int = GIB, **batch: Any) -> Spec:
    return Spec(
        input="-",
        output=OutputSection(path="-"),
        memory=MemorySection(weights=weights, kv=kv),
        batch=BatchSection(**batch),
    )


def layouts(places: list[Place] = ALONE) -> list[CacheLayout]:
    return rank_layouts(LLAMA_8B, places, "f16")


BLOCK = layouts()[0].block_nbytes


def made(
    job: Spec, streams: bool, max_context: int = 4096, places: list[Place] = ALONE
) -> tuple[int, int, int]:
    found = limits(job, ROWS, places, layouts(places), max_context, [int(streams) for _ in places])
    assert found.streams is streams
    assert found.micro_batches == places[0].stages
    return found.n_blocks, found.max_sequences, found.max_tokens


def test_resident_weights_take_fixed_steps() -> None:
    assert made(spec(kv=10**15), streams=False) == (256 * 4096 // KV_BLOCK, 256, 512)
    assert made(spec(), streams=False) == (GIB // BLOCK, 256, 512)


def test_a_cache_has_the_blocks_that_its_input_needs_and_those_of_the_longest_request() -> None:
    def blocks(asked: InputNeeds) -> int:
        return limits(spec(kv=10**15), ROWS, ALONE, layouts(), 4096, [0], asked=asked).n_blocks

    assert blocks(InputNeeds(lines=9, sequences=9, blocks=300)) == 309
    longest = blocks(InputNeeds(lines=1, sequences=1, blocks=1))
    assert longest == 4096 // KV_BLOCK, "which lines are refused does not depend on other lines"
    assert blocks(InputNeeds(lines=9, blocks=None)) == blocks(InputNeeds()) == 256 * 4096 // KV_BLOCK


@pytest.mark.parametrize("part", [0.0, 0.25, 0.5, 1.0])
def test_a_replica_has_the_blocks_and_slots_of_its_part(part: float) -> None:
    """If it computes more of the lines, fewer of them run at once; a request of the maximum length always fits."""
    asked = InputNeeds(lines=200, sequences=200, largest=1, blocks=2000, blocks_of_lines=((10, 200),))
    found = limits(spec(kv=10**15), ROWS, ALONE, layouts(), 512, [0], asked=asked, part=part)
    assert found.n_blocks == max(part * 2200, 512 // KV_BLOCK)
    states = CacheCapacity(blocks=1, blocks_in_memory=1, slots=256, saved=4)
    assert states.slots_of(asked, part) == max(part * 200, 1), (
        "0 slots would mean that the model has no states"
    )
    assert states.slots_of(NO_INPUT, 1.0) == 256


def test_streamed_weights_take_all_that_the_kv_cache_holds() -> None:
    small = made(spec(GIB), streams=True)
    assert small == (GIB // BLOCK, GIB // BLOCK, small[2])
    wide = made(spec(GIB, kv=64 * GIB), streams=True)
    assert wide == (64 * GIB // BLOCK, MAX_TOKENS, MAX_TOKENS)


@pytest.mark.parametrize("weights", [GIB // 2, GIB, 4 * GIB])
@pytest.mark.parametrize("places", [ALONE, [Place(rank, 2, 2) for rank in range(4)]])
def test_activations_take_an_eighth_of_the_budgets(weights: int, places: list[Place]) -> None:
    tokens = step_size(spec(weights), ROWS, places, streams=True).tokens
    if 512 < tokens < MAX_TOKENS:
        fewer, more = (max(ROWS.nbytes(place, rows) for place in places) for rows in (tokens, tokens + 1))
        assert fewer <= (weights + GIB) // 8 < more


def test_what_is_asked_for_is_kept() -> None:
    job = spec(GIB, max_num_seqs=7, max_num_batched_tokens=33)
    assert made(job, streams=True)[1:] == made(job, streams=False)[1:] == (7, 33)
    assert made(spec(GIB, max_num_batched_tokens=33), streams=True)[1:] == (33, 33)
    assert made(spec(GIB, max_num_seqs=1000), streams=False)[2] == 1000


def test_it_is_said() -> None:
    assert step_description(9, 70, 0) == "a step has up to 9 sequences and 70 tokens"
    assert step_description(9, 70, 3 * 2**20) == (
        "3.0 MiB of weights are read for each step; a step has up to 9 sequences and 70 tokens"
    )


@pytest.mark.parametrize(
    ("states", "sequences", "slots", "saved"),
    [(7, 100, 7, 0), (8, 100, 7, 1), (40, 100, 35, 5), (40, 10, 10, 5), (4000, 9, 9, 64)],
)
@pytest.mark.parametrize("tokens", [True, False])
def test_one_in_eight_states_is_for_those_that_are_saved(
    states: int, sequences: int, slots: int, saved: int, tokens: bool
) -> None:
    """Beside attention states have half of the memory; all of them are within the budget."""
    caches = [(SequenceState(10_000),), *([(TokenCache(2, 64, 64),)] if tokens else [])]
    layout = cache_layout(caches, groups_of(caches), range(len(caches)), BlockType.F16)
    budget = 10_000 * states * (2 if tokens else 1)
    found = cache_capacity(spec(kv=budget), [layout], [0], sequences)
    assert (found.slots, found.saved) == (slots, saved)
    assert found.states * 10_000 + found.blocks * layout.block_nbytes <= budget
    assert cache_in_memory(spec(kv=budget), layout, found.blocks, found.states, found.blocks) <= budget
    assert cache_capacity(spec(kv=budget, prefix_sharing=False), [layout], [0], sequences).saved == 0


def test_a_few_blocks_of_a_large_cache_take_whole_huge_pages() -> None:
    """Each pool of 4 MiB or more is used two MiB at a time, and never beyond its end or the budget."""
    caches = [(TokenCache(2, 64, 64),)] * 3
    layout = cache_layout(caches, groups_of(caches), range(3), BlockType.F16)
    (keys, values), *_ = layout.pools
    assert keys == values
    large = 8 * 2**20 // keys
    assert cache_in_memory(spec(kv=2**30), layout, 1, 0, large) == 6 * 2 * 2**20
    assert cache_in_memory(spec(kv=2**30), layout, large, 0, large) == 6 * large * keys
    assert cache_in_memory(spec(kv=2**30), layout, 1, 0, 100) == layout.block_nbytes
    assert cache_in_memory(spec(kv=2**20), layout, 1, 0, large) == 2**20
