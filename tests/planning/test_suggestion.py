"""The job that `plan --suggest` writes."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from mpillm import spec
from mpillm.bench import synthetic
from mpillm.bench.synthetic_shapes import SHAPES
from mpillm.errors import JobError
from mpillm.planning import hosts, suggestion
from mpillm.planning.hosts import Host
from mpillm.spec.reading import toml
from mpillm.store import report
from tests.conftest import run_bounded
from tests.model.golden import FIXTURES
from tests.run.asked import ids


def test_the_least_memory_for_a_rate_is_a_job() -> None:
    job = spec.load(None, [], model=str(FIXTURES / "models/llama3"), input="in", output="out")
    machines = hosts.machines_of([Host(memory="1GiB", disk_gbs=0.001)])
    slow, fast = (suggestion.job_file(job, machines, rate) for rate in (1, 1000))
    given = ["batch.speculation=off", "layout.shards=1", "sampling.temperature=0.5", "memory.kv=2GiB"]
    given += ['sampling.stop=["a\\n"]', 'request={"prompt": "a \\"quoted\\" {word}"}']
    asked = spec.load(None, given, model=str(FIXTURES / "models/llama3"), input="in.csv", output="out")
    kept = spec.checked(toml(suggestion.job_file(asked, machines, 1)), "the suggestion")
    memory = msgspec.structs.replace(kept.memory, weights="all", kv="2GiB")
    assert 2**20 <= kept.memory.kv_bytes < 2**30, "the cache is made smaller as well"
    assert msgspec.structs.replace(kept, memory=memory) == asked, "all else is as it was asked for"
    sizes = [int(toml(text)["memory"]["weights"].removesuffix("MiB")) for text in (slow, fast)]
    assert sizes == sorted(sizes)
    assert max(len(line) for line in fast.splitlines() if line.startswith("#")) <= 80
    with pytest.raises(JobError, match="No amount of memory gives 1e\\+15 tokens/s on 1 rank"):
        suggestion.job_file(job, machines, 1e15)


@pytest.mark.slow
def test_a_suggested_job_runs_as_it_says(tmp_path: Path) -> None:
    """By this machine's speeds a fifth of what all memory gives, as other tests may run beside it."""
    shape = replace(SHAPES["llama-1b"], hidden=512, layers=8, ffn=2048, heads=8, kv_heads=4, vocab=1024)
    synthetic.write(model := tmp_path / "small.gguf", "small", shape, "bf16")
    lines = [json.dumps(line) for line in ids(random.Random(1), 24, 60, 1000)]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))

    def mpillm(*words: str) -> str:
        done = run_bounded([sys.executable, "-m", "mpillm", *words], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    mpillm("doctor", "--output", "hosts.toml")
    asked = ["--model", str(model), "--input", "requests.jsonl", "--hosts", "hosts.toml"]
    best = json.loads(mpillm("plan", *asked, "--json"))
    text = mpillm("plan", *asked, "--suggest", str(best["time"]["rate"] / 5))
    (tmp_path / "job.toml").write_text(text)
    rate, held = re.findall(
        r"# (\S+) tokens/s on 1 rank \(measured speeds\); at most (\S+) MiB on a rank", text
    )[0]
    assert float(rate) >= best["time"]["rate"] / 5
    [whole] = best["ranks"]
    assert (
        float(held) < sum(whole[key] for key in ("weights_held", "kv_held", "activations", "process")) / 2**20
    )
    mpillm("run", "job.toml")
    made = report.read(tmp_path / "out")
    [rank] = made.ranks
    assert rank.memory_peak <= 2**20 * (float(held) + 0.1)
    assert made.tokens.computed / made.phases["compute"] >= best["time"]["rate"] / 5
