"""LoRA adapters in every layout of the ranks there are: PEFT's values, and the bits of one rank."""

from __future__ import annotations

import pytest

from mpillm.comm.world import World
from tests.model.adapted import both, check_both
from tests.model.engine_harness import layouts, run_laid_out
from tests.model.golden import ADAPTERS, adapted_model, model_path

FEW = ["llama3_patterns", "olmo2_all", "qwen2_moe_shared"]


@pytest.mark.mpi
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in ADAPTERS]
)
def test_every_layout(name: str, world: World) -> None:
    if world.size > 4:
        pytest.skip("what an adapter adds is summed as a matrix is: test_models.py")
    requests, job = both(name)
    model = model_path(adapted_model(name))
    for stages, shards in layouts(model, world.size):
        completions, _ = run_laid_out(world, model, requests, stages=stages, shards=shards, **job)
        if world.rank == 0:
            check_both(name, completions)
