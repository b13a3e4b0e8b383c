"""Run the real engine: on one rank inside the test's process, or on all ranks of a program under mpiexec."""

from __future__ import annotations

import functools
from contextlib import closing
from pathlib import Path
from typing import Any

from mpillm.comm.program import start
from mpillm.comm.world import World
from mpillm.engine.engine import Engine
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.engine.worker import follow
from mpillm.model.opening import config_of, open_source
from mpillm.partition import grid
from mpillm.run.session import Session
from mpillm.spec import BatchSection, LayoutSection, MemorySection, OutputSection, Spec, WireSection

SECTIONS = {"layout": LayoutSection, "memory": MemorySection, "wire": WireSection, "batch": BatchSection}


def spec_of(model: Path, **job: Any) -> Spec:
    """What a job file would say; `job` names its keys by their last parts."""
    tables = {
        name: kind(**{key: job.pop(key) for key in kind.__struct_fields__ if key in job})
        for name, kind in SECTIONS.items()
    }
    return Spec(model=str(model), input="-", output=OutputSection(path="-"), **tables, **job)


def run_laid_out(
    world: World, model: Path, requests: list[Request], **job: Any
) -> tuple[list[FinishedCompletion], Session]:
    """Collective: what all ranks make of `requests` (in their order, on rank 0), and the closed session."""
    with closing(Session(world, spec_of(model, **job), model)) as session:
        completions: dict[tuple[str, int], FinishedCompletion] = {}
        if world.rank > 0:
            follow(session.worker, session.channel)
        else:
            engine = Engine(session.worker, session.channel, session.limits, session.shard_vocab)
            for finished in engine.run(requests):
                completions |= {(one.request.id, one.request.choice): one for one in finished}
            engine.stop(0)
        world.barrier()
    return [completions[one.id, one.choice] for one in requests if completions], session


@functools.cache
def _alone() -> World:
    return start()


def run_engine(model: Path, requests: list[Request], **job: Any) -> list[FinishedCompletion]:
    """What the engine makes of `requests`, in their order, on one rank.

    `model` is a Hugging Face directory or a GGUF file. `job` holds what a job file would say, by the last part of its
    keys: quantize, activations, kv_type, weights, policy, max_num_seqs, max_num_batched_tokens.
    """
    return run_laid_out(_alone(), model, requests, **job)[0]


def layouts(model: Path, ranks: int) -> list[tuple[int, int]]:
    """All layouts of a model on so many ranks: (stages, shards)."""
    with closing(open_source(model)) as source:
        return grid.layouts(config_of(source), ranks)


def vocab_of(model: Path) -> int:
    """How many tokens a model knows."""
    with closing(open_source(model)) as source:
        return config_of(source).vocab
