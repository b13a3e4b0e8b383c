"""A real job on a tiny model, for tests that start it in unusual places: what comes out must be the same bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.conftest import ROOT, Mpi

MODEL = ROOT / "tests" / "fixtures" / "models" / "llama3"
VOCAB = 139


def write_job(folder: Path, requests: int = 12, max_tokens: int = 16) -> Path:
    """Write job.toml and input.jsonl: sampled and greedy requests of token ids; f32 on the wire, so that the
    number of shards does not matter either."""
    draw = random.Random(requests)
    lines = []
    for number in range(requests):
        body = {"prompt": [draw.randrange(VOCAB) for _ in range(draw.randint(1, 40))], "ignore_eos": True}
        body |= {"temperature": 0.9, "seed": number} if number % 2 else {}
        lines.append({"custom_id": f"r{number}", "url": "/v1/completions", "body": body})
    (folder / "input.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = folder / "job.toml"
    job.write_text(
        f'model = "{MODEL}"\ninput = "input.jsonl"\noutput = "out"\n'
        f'[sampling]\nmax_tokens = {max_tokens}\n[memory]\nkv = "16MiB"\n[wire]\nactivations = "f32"\n'
    )
    return job


def results(folder: Path, output: str = "out") -> bytes:
    return (folder / output / "results.jsonl").read_bytes()


def reference(folder: Path, mpi: Mpi, job: Path) -> bytes:
    """The results of one rank on this machine; each request was answered."""
    done = mpi.run(1, "-m", "mpillm", "run", job, "--output", "alone", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = results(folder, "alone")
    assert all(json.loads(line)["error"] is None for line in found.splitlines())
    return found
