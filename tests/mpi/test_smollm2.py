"""SmolLM2 over several ranks: near llama.cpp with either wire, and as many bytes fewer with Q8_0 as its blocks say."""

from __future__ import annotations

import pytest

from mpillm.comm.world import World
from tests.model.engine_harness import run_laid_out
from tests.model.test_smollm2 import check_smollm2, requests, smollm2


@pytest.mark.mpi(min_size=2)
@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False])
def test_near_llama_cpp_and_few_bytes(sharded: bool, world: World) -> None:
    stages, shards = (1, world.size) if sharded else (world.size, 1)
    model = smollm2()  # skips where there is none
    sent = {}
    for wire in ("f32", "q8_0"):
        completions, session = run_laid_out(
            world,
            model,
            requests(),
            stages=stages,
            shards=shards,
            activations=wire,
            between_stages=wire,
            speculation="off",  # what is drafted depends on the time
        )
        counts = session.counters
        sent[wire] = sum(world.gather(counts.all_reduce.bytes_sent + counts.pipe.bytes_sent))
        if world.rank == 0:
            # The figures that notes quote.
            print(stages, shards, wire, check_smollm2(completions), sent[wire])
    # Float32 goes to each other shard, through this machine's memory, 128 bytes a block. Q8_0 of more than two shards
    # goes by pieces: a part of each row, 34 bytes a block, and the sum of another part, 52.
    saved = 1 - 86 / (128 * shards) if shards > 2 else 1 - 34 / 128
    assert 1 - sent["q8_0"] / sent["f32"] == pytest.approx(saved, abs=5e-4)
