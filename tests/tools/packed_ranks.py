"""Run under mpiexec: a packed model on every layout of so many ranks, with the least budget; all must give one digest.

packed_ranks.py DIRECTORY MODEL DIGEST
"""

from __future__ import annotations

import sys
from pathlib import Path

from mpillm.comm.program import guard
from mpillm.comm.world import World
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.weights.paging.weights import minimum_budget
from mpillm.weights.source import rank_plans
from tests.model.checks import digest, requests_of, sampled
from tests.model.engine_harness import layouts, run_laid_out
from tests.model.golden import golden


def main(world: World) -> int:
    path, name, wanted = Path(sys.argv[1]), *sys.argv[2:]
    reference = golden(name)
    requests = [*requests_of(reference)[-3:], *sampled(reference)[:2]]
    for number, (stages, shards) in enumerate(layouts(path, world.size)):
        completions, _ = run_laid_out(
            world, path, requests, stages=stages, shards=shards, activations="f32", kv_type="f32",
            weights=minimum(path, stages, shards), loader=("mmap", "read")[number % 2],
        )  # fmt: skip
        if world.rank == 0:
            assert digest(completions) == wanted, (stages, shards)
    return 0


def minimum(path: Path, stages: int, shards: int) -> int:
    """The smallest budget with which every rank can work."""
    source = open_source(path)
    try:
        config = config_of(source)
        places = [Place(rank, stages, shards) for rank in range(stages * shards)]
        return max(minimum_budget(rank_plans(config, place, source)) for place in places)
    finally:
        source.close()


if __name__ == "__main__":
    sys.exit(guard(main))
