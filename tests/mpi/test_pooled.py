"""Models that classify or make vectors in every layout of the ranks there are: transformers' values, the same bits."""

from __future__ import annotations

import pytest

from mpillm.comm.world import World
from tests.model import pooled
from tests.model.engine_harness import layouts, run_laid_out


@pytest.mark.mpi
@pytest.mark.parametrize("name", pooled.NAMES)
def test_every_layout(name: str, world: World) -> None:
    model, prompts = pooled.FOLDER / name, pooled.golden(name)
    requests, found = pooled.requests_of(prompts), []
    for stages, shards in layouts(model, world.size):
        job = {"kv_type": "f32", "activations": "f32", "stages": stages, "shards": shards}
        completions, _ = run_laid_out(world, model, requests, **job)
        if world.rank == 0:
            pooled.check(prompts, completions, pooled.classifier_of(model))
            found.append([pooled.bits(completion) for completion in completions])
    assert all(other == found[0] for other in found)
