"""The job that `plan --suggest` writes."""

from __future__ import annotations

import msgspec
import pytest

from mpillm import spec
from mpillm.errors import JobError
from mpillm.planning import hosts, suggestion
from mpillm.planning.hosts import Host
from mpillm.spec.reading import toml
from tests.model.golden import FIXTURES


def test_the_least_memory_for_a_rate_is_a_job() -> None:
    job = spec.load(None, [], model=str(FIXTURES / "models/llama3"), input="in", output="out")
    machines = hosts.machines_of([Host(memory="1GiB", disk_gbs=0.001)])
    slow, fast = (suggestion.job_file(job, machines, rate) for rate in (1, 1000))
    given = ["batch.speculation=off", "layout.shards=1", "sampling.temperature=0.5", "memory.kv=2GiB"]
    given += ['sampling.stop=["a\\n"]', 'request={"prompt": "a \\"quoted\\" {word}"}']
    asked = spec.load(None, given, model=str(FIXTURES / "models/llama3"), input="in.csv", output="out")
    kept = spec.checked(toml(suggestion.job_file(asked, machines, 1)), "the suggestion")
    memory = msgspec.structs.replace(kept.memory, weights="all")
    assert msgspec.structs.replace(kept, memory=memory) == asked, "all else is as it was asked for"
    sizes = [int(toml(text)["memory"]["weights"].removesuffix("MiB")) for text in (slow, fast)]
    assert sizes == sorted(sizes)
    with pytest.raises(JobError, match="No amount of memory gives 1e\\+15 tokens/s on 1 rank"):
        suggestion.job_file(job, machines, 1e15)
