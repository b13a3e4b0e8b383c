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
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from mpillm import kernels
from mpillm.comm import collectives, exchange, parts, shared, waiting
from mpillm.comm.program import guard, world_of
from mpillm.comm.world import World
from mpillm.engine import reply
from mpillm.engine.request import Request
from mpillm.engine.worker import Worker
from mpillm.errors import LayoutError
from mpillm.kernels import KV_BLOCK
from mpillm.model.batch import NO_ADAPTER
from mpillm.model.decoder import Decoder
from mpillm.model.opening import config_of, open_source
from mpillm.partition import grid
from mpillm.planning import plan
from mpillm.run import session
from mpillm.run.session import Session
from mpillm.spec import DraftSection
from tests.digests import recorded
from tests.digests.recorded import digest_of
from tests.model.engine_harness import run_laid_out, spec_of
from tests.model.golden import ADAPTERS, FIXTURES, GGUFS, MODELS, adapted_model, path_of

LIMIT = 240  # seconds, on a busy machine
CONSTANTS: dict[tuple[Any, str], tuple[float, ...]] = {
    (parts, "LANES"): (0.0, 0.0, 0.8e-3),
    (parts, "LANE_ROWS"): (2, 3, 16),
    (parts, "EAGER"): (500, 4000, 60_000),
    (parts, "ADDER"): (1e-9, 1e-5, 25e-6),
    (shared, "LARGEST"): (2**9, 2**12, 2**20),
    (exchange, "HEAD"): (64, 512),
    (waiting, "SPIN"): (0.0, 2e-3),
    (reply, "TILE"): (3, 64),
}
SHARED_ROWS, MAKE_GROUP, MAKE_WORKER = session.shared_rows, collectives.Group.__init__, Session._make_worker
BEGIN, FORWARD, STEP = collectives.Group.begin, Decoder.forward, Worker.step
TURNS = 4  # runs of a job
Job = dict[str, Any]  # as `run_laid_out` takes it


def differ(draw: random.Random, own: random.Random) -> None:
    """Change the program in what all ranks have alike, from `draw`, and in what this one has alone."""
    for (module, name), values in CONSTANTS.items():
        setattr(module, name, draw.choice(values))
    apart, rate, crowded = draw.random() < 0.6, draw.choice((0.0, 1e6, 1e8)), draw.random() < 0.5
    loader, renews, late = (
        own.choice(("auto", "mmap", "read")),
        own.choice((0.0, 0.1, 0.5)),
        own.choice((0.0, 0.02)),
    )
    kernels.set_path(own.choice([path for path in kernels.available() if path != "numpy"]))

    def make_group(self: Any, *args: Any) -> None:
        MAKE_GROUP(self, *args)
        self._rate, self._crowded = rate or self._rate, crowded

    def make_worker(self: Any) -> None:
        memory = msgspec.structs.replace(self.spec.memory, loader=loader)
        self.spec = msgspec.structs.replace(self.spec, memory=memory)
        MAKE_WORKER(self)

    def delayed(original: Any) -> Any:
        def call(self: Any, *args: Any) -> Any:
            time.sleep(own.choice((1e-4, 1e-3, 3e-3)) if own.random() < late else 0)
            return original(self, *args)

        return call

    def step(self: Any, *args: Any) -> Any:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        if own.random() < renews:  # as when the loader has packed weights
            self.decoder._forget_pages()
        return STEP(self, *args)

    for owner, name, made in (
        (Session, "_make_worker", make_worker),
        (collectives.Group, "__init__", make_group),
        (collectives.Group, "begin", delayed(BEGIN)),
        (Decoder, "forward", delayed(FORWARD)),
        (Worker, "step", step),
        (session, "shared_rows", (lambda *_: None) if apart else SHARED_ROWS),  # without: as between hosts
    ):
        setattr(owner, name, made)


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
            differ(draw, random.Random(f"{seed} {number} {turn} {world.rank}"))
            if world.rank == 0:
                print(f"{number}.{turn}: {name} {stages} x {shards}", end=" ", flush=True)
            faulthandler.dump_traceback_later(LIMIT, exit=True)
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
