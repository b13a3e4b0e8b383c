"""The jobs people start from: each parses, and no line of its input is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpillm import spec
from mpillm.batch import requests
from mpillm.batch.endpoints import ChatCompletionsEndpoint
from tests.job_helpers import WITH_TEXT

JOBS = Path(__file__).parent.parent.parent / "jobs"


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_job_and_its_input(path: Path) -> None:
    said = spec.load(path)
    assert said.input_path.parent == JOBS
    assert said.output.path == f"out/{path.stem}"
    large = replace(WITH_TEXT, vocab=49152, max_position=8192)
    batch = requests.check(said.input_path, said, large)
    assert batch.bad == 0
    assert len(batch) >= 3


def test_the_quickstart_is_short_and_greedy_by_default() -> None:
    said = spec.load(JOBS / "quickstart.toml")
    assert said.model == "smollm2-135m"
    batch = requests.check(said.input_path, said, WITH_TEXT)
    for work in batch.works():
        assert isinstance(work.endpoint, ChatCompletionsEndpoint)
        assert work.requests[0].max_tokens <= 64
    assert 6 <= len(batch) <= 8


def test_there_is_one_of_each_kind() -> None:
    assert {path.stem for path in JOBS.glob("*.toml")} == {
        "quickstart", "summaries", "scoring", "embeddings", "large-model",
    }  # fmt: skip
    used = {spec.load(path).input_path.name for path in JOBS.glob("*.toml")}
    assert used == {path.name for path in JOBS.glob("*.jsonl")}
