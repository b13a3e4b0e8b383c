"""Run under mpiexec: SmolLM2 on a layout with both wires, against llama.cpp's values; rank 0 prints how far off it is.

smollm2.py STAGES SHARDS
"""

from __future__ import annotations

import json
import sys

import numpy as np

from mpillm.comm.world import World, guard
from tests.model.engine_harness import run_laid_out
from tests.model.test_smollm2 import check_smollm2, requests, smollm2


def main(world: World) -> int:
    stages, shards = map(int, sys.argv[1:])
    off: dict[str, dict[str, float]] = {}
    scores = []
    for wire in ("f32", "q8_0"):
        completions, session = run_laid_out(
            world, smollm2(), requests(), stages=stages, shards=shards, activations=wire, between_stages=wire
        )
        counts = session.counters
        sent = world.gather(counts.all_reduce.bytes_sent + counts.pipe.bytes_sent)
        if world.rank == 0:
            off[wire] = {**check_smollm2(completions), "bytes": sum(sent)}
            scores.append(np.concatenate([one.prompt_logprobs for one in completions]))
    if world.rank == 0:
        off["between the wires"] = {"logprob": float(np.abs(scores[0] - scores[1]).mean())}
        print(json.dumps(off))
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
