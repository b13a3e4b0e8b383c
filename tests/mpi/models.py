"""Run under mpiexec: tiny models on every layout of so many ranks, checked against transformers' values by rank 0.

    models.py DIGESTS.json [MODEL ...]

writes, by model, wire and layout, a digest of all numbers that came out: tests compare those between numbers of ranks.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from mpillm.comm.world import World, guard
from mpillm.engine.sequence import Completion, Request
from mpillm.model.config import ModelConfig
from mpillm.partition import grid
from mpillm.weights.source import column_unit, open_source
from tests.model.checks import bounds_of, check, requests_of
from tests.model.engine_harness import run_laid_out
from tests.model.golden import FIXTURES, PLAIN_GGUFS, golden


def main(world: World) -> int:
    target, *names = sys.argv[1:]
    digests = {}
    for name in names:
        gguf = name.endswith(".gguf")
        path = FIXTURES / ("gguf" if gguf else "models") / name
        reference = golden(name)
        exact = not gguf or name.removesuffix(".gguf") in PLAIN_GGUFS
        requests = [*requests_of(reference), *sampled(reference)]
        for stages, shards in layouts(path, world.size):
            for wire in ("f32", "q8_0"):
                completions, _ = run_laid_out(
                    world, path, requests, stages=stages, shards=shards, activations=wire, kv_type="f32"
                )
                if world.rank == 0:
                    graded = [one for one in completions if not one.request.id.startswith("sampled")]
                    check(reference, graded, bounds_of(name, not exact or wire != "f32"))
                    digests[f"{name} {wire} {stages}x{shards}"] = digest(completions)
    if world.rank == 0:
        Path(target).write_text(json.dumps(digests))
    return 0


def layouts(path: Path, ranks: int) -> list[tuple[int, int]]:
    """All layouts of a model on so many ranks."""
    source = open_source(path)
    try:
        return grid.layouts(ModelConfig.from_dict(source.config).shape(column_unit(source)), ranks)
    finally:
        source.close()


def sampled(reference: dict) -> list[Request]:
    """Requests that draw: with every filter, with a penalty, and from the whole row (which then has to travel)."""
    prompt = tuple(reference["prompts"][1]["ids"])
    settings = [
        {"temperature": 1.0},
        {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3, "logprobs": 3},
        {"temperature": 0.8, "top_k": 20, "min_p": 0.01, "choice": 1},
        {"temperature": 50.0, "seed": 9},
    ]
    return [
        Request(f"sampled-{i}", prompt, max_tokens=8, **more)  # type: ignore[arg-type]
        for i, more in enumerate(settings)
    ]


def digest(completions: list[Completion]) -> str:
    """A hash of every token and every bit of every number."""
    state = hashlib.blake2b(digest_size=16)
    for one in completions:
        numbers = [*one.logprobs, *one.prompt_logprobs]
        numbers += [value for row in (*one.top, *one.prompt_top) for pair in row for value in pair]
        state.update(repr((one.request.id, one.tokens, one.finish_reason)).encode())
        state.update(np.array(numbers, np.float64).tobytes())
        state.update(b"" if one.embedding is None else one.embedding.tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    sys.exit(guard(main))
