"""Runs on ranks that differ: `mpiexec -n 4 python -m tests.unequal --runs 100 --seed S`, with either MPI.

Models, requests, layouts and wires are drawn, and for each rank its budgets, threads, loader, instructions, delays, and
the steps before which its weights are made anew. Constants are small, so that rare messages are common. All ranks must
agree about messages: each run ends, with the bytes of one rank, or, where activations travel in Q8_0, with those of the
first run with as many shards or stages. A rank that makes no step for LIMIT seconds prints its stack and ends all.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import random
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpillm.comm.program import guard, world_of
from mpillm.comm.world import World
from mpillm.engine.request import Request
from mpillm.errors import LayoutError
from mpillm.kernels import KV_BLOCK
from mpillm.model.batch import NO_ADAPTER
from mpillm.model.opening import config_of, open_source
from mpillm.partition import grid
from mpillm.planning import plan
from mpillm.spec import DraftSection
from tests.digests import recorded
from tests.digests.recorded import digest_of
from tests.model.engine_harness import run_laid_out, spec_of
from tests.model.golden import ADAPTERS, FIXTURES, GGUFS, MODELS, adapted_model, path_of
from tests.unequal.differing import differ

LIMIT = 240  # seconds, on a busy machine
TURNS = 4  # runs of a job
Job = dict[str, Any]  # as `run_laid_out` takes it


def alive() -> None:
    """End this rank, with its stacks, if this is not called again within LIMIT."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)


def requests_of(draw: random.Random, vocab: int, tuned: bool) -> list[Request]:
    """Some of every kind, cut anywhere, a few of them for the adapter."""
    made, known = list[Request](), recorded.requests(vocab)
    for number in range(draw.choice((2, 6, 12, 25))):
        one, adapter = draw.choice(known), 1 if tuned and draw.random() < 0.2 else NO_ADAPTER
        prompt = one.prompt[: draw.randint(1, len(one.prompt))]
        made.append(replace(one, id=f"r{number}", prompt=prompt, adapter=adapter))
    return made


def job_of(draw: random.Random, name: str, path: Path) -> Job:
    """What changes the answers, or may not."""
    modes = "auto", "off", "always", "prompt-lookup"
    job: Job = {"speculation": draw.choice(modes), "kv_type": draw.choice(("auto", "f32", "f16"))}
    if not name.endswith(".gguf") and "mxfp4" not in name:
        job["quantize"] = draw.choice(("none", "none", "q8_0", "q4_0", "w8a8"))
    if (tuned := [one for one in ADAPTERS if adapted_model(one) == name]) and draw.random() < 0.7:
        job["adapters"] = {"tuned": str(FIXTURES / "adapters" / draw.choice(tuned))}
    if draw.random() < 0.15:
        job["draft"] = DraftSection(model=str(path))
    return job


def unequal(draw: random.Random, path: Path, job: Job) -> Job:
    """The job with budgets and threads that differ from rank to rank, in a layout that it has."""
    ranks = plan.make(spec_of(path, **{**job, "draft": DraftSection()}), job["stages"] * job["shards"]).ranks
    block = KV_BLOCK * max(rank.kv_token for rank in ranks) + 2 * max(rank.kv_state for rank in ranks)
    weights = []
    for rank in ranks:
        tight = max(rank.weights_minimum, int(draw.choice((0.0, 0.5, 0.9)) * rank.weights_share))
        weights.append(draw.choice(("all", "all", tight)))
    return job | {
        "weights": weights,
        "kv": [draw.choice((40, 60, 400)) * block for _ in ranks],
        "kv_spill": draw.choice(("none", 200 * block)),
        "policy": draw.choice(("cycle", "lru")),
        "threads": [draw.choice((1, 1, 1, 2)) for _ in ranks],
        "max_num_seqs": draw.choice((2, 5, 16, 64)),
        "max_num_batched_tokens": draw.choice((8, 33, 256)),
        "prefix_sharing": draw.random() < 0.5,
        "activations": draw.choice(("auto", "f32", "q8_0", "q8_0")),
        "between_stages": draw.choice(("f32", "f32", "q8_0")),
    }


def main(world: World, runs: int, seed: int) -> int:
    from mpi4py import MPI

    alone, done, wrong, number = world_of(MPI.COMM_SELF), 0, 0, 0
    while done < runs:
        number += 1
        draw = random.Random(f"{seed} {number}")  # alike on all ranks
        name = draw.choice((*MODELS, *MODELS, *(f"{one}.gguf" for one in GGUFS), *["llama3"] * 8))
        path = path_of(name)
        job = job_of(draw, name, path)
        with closing(open_source(path, job.get("quantize", "none"))) as source:
            config = config_of(source)
        shapes = grid.layouts(config, world.size)
        requests = requests_of(draw, config.vocab, "adapters" in job)
        known: dict[object, str] = {}
        if world.rank == 0 and shapes:
            known["f32", 0, "f32", 0] = digest_of(run_laid_out(alone, path, requests, **job)[0])
        for turn in range(TURNS if shapes else 0):
            stages, shards = draw.choice([*shapes, *(shape for shape in shapes if shape[1] > 1)])
            try:
                asked = unequal(draw, path, job | {"stages": stages, "shards": shards})
            except LayoutError:  # an adapter may forbid it
                continue
            differ(draw, random.Random(f"{seed} {number} {turn} {world.rank}"), alive)
            if world.rank == 0:
                print(f"{number}.{turn}: {name} {stages} x {shards}", end=" ", flush=True)
            alive()
            completions, used = run_laid_out(world, path, requests, **asked)
            wire = ("f32", 0) if shards == 1 or used.wire == "f32" else (used.wire, shards)
            between = ("f32", 0) if stages == 1 or asked["between_stages"] == "f32" else ("q8_0", stages)
            done += 1
            if world.rank == 0:
                found = digest_of(completions)
                same = found == known.setdefault((*wire, *between), found)
                wrong += not same
                print("ok" if same else f"OTHER BYTES: {asked}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    if world.rank == 0:
        print(f"{done} runs, {wrong} with other bytes (seed {seed})", flush=True)
    return int(world.bcast(wrong) > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.unequal", description=__doc__)
    parser.add_argument("--runs", type=int, default=40, help="how many (40)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (1)")
    options = parser.parse_args()
    sys.exit(guard(functools.partial(main, runs=options.runs, seed=options.seed)))
