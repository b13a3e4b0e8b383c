"""Run under mpiexec: tiny models on every layout of so many ranks, checked against transformers' values by rank 0.

    models.py DIGESTS.json [MODEL ...]

writes, by model, wire and layout, a digest of all numbers that came out: tests compare those between numbers of ranks.
Beside them come digests that were recorded once (`tests.digests.recorded`), by the names they have there.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.comm.world import World, guard
from mpillm.engine.sequence import Completion, Request
from mpillm.model.opening import config_of, open_source
from mpillm.partition import grid
from tests.digests import recorded
from tests.model.checks import bounds_of, check, requests_of
from tests.model.engine_harness import run_laid_out
from tests.model.golden import FIXTURES, PLAIN_GGUFS, golden


def main(world: World) -> int:
    target, *names = sys.argv[1:]
    digests: dict[str, dict[str, str]] = {"all": {}, "recorded": {}}
    for name in names:
        gguf = name.endswith(".gguf")
        path = FIXTURES / ("gguf" if gguf else "models") / name
        reference = golden(name)
        exact = not gguf or name.removesuffix(".gguf") in PLAIN_GGUFS
        graded = requests_of(reference)
        free = [*graded, *sampled(reference)]
        requests = [*free, *recorded.requests(vocab_of(path))]
        job: dict[str, Any] = {"kv_type": "f32"}
        for stages, shards in layouts(path, world.size):
            job |= {"stages": stages, "shards": shards}
            for wire in ("f32", "q8_0"):
                completions, _ = run_laid_out(world, path, requests, **job, activations=wire)
                if world.rank == 0:
                    check(reference, completions[: len(graded)], bounds_of(name, not exact or wire != "f32"))
                    digests["all"][f"{name} {wire} {stages}x{shards}"] = digest(completions[: len(free)])
                    settings = f" wire=q8_0 shards={shards}" if wire == "q8_0" and shards > 1 else ""
                    note(digests["recorded"], name, settings, completions[len(free) :])
            if stages > 1:
                completions, _ = run_laid_out(
                    world, path, requests[len(free) :], **job, activations="f32", between_stages="q8_0"
                )
                if world.rank == 0:
                    note(digests["recorded"], name, f" between=q8_0 stages={stages}", completions)
    if world.rank == 0:
        Path(target).write_text(json.dumps(digests))
    return 0


def note(digests: dict[str, str], name: str, settings: str, completions: list[Completion]) -> None:
    """Keep the digest of what these settings give; all layouts that should give it must agree."""
    known = name + (" kv=f32" if name.endswith(".gguf") else "") + settings
    found = recorded.digest_of(completions)
    assert digests.setdefault(known, found) == found, known


def vocab_of(path: Path) -> int:
    with closing(open_source(path)) as source:
        return config_of(source).vocab


def layouts(path: Path, ranks: int) -> list[tuple[int, int]]:
    """All layouts of a model on so many ranks."""
    source = open_source(path)
    try:
        return grid.layouts(config_of(source), ranks)
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
