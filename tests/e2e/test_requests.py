"""What a request can ask for, seen in its answer: stops, choices, seeds, log-probabilities, pooling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Mpi
from tests.e2e.jobs import results, run, write_lines

pytestmark = pytest.mark.mpiexec
PROMPT = "the quick brown fox"


def answers(mpi: Mpi, folder: Path, *bodies: dict[str, Any], ranks: int = 2) -> list[dict[str, Any]]:
    """The response bodies to completions (or embeddings) of PROMPT with these settings."""
    lines = [body if "input" in body else {"prompt": PROMPT, **body} for body in bodies]
    output = folder / "out"
    done = run(mpi, ranks, write_lines(folder / "in.jsonl", lines), output)
    assert done.returncode == 0, done.stderr
    return [line["response"]["body"] for line in results(output)]


def choice(body: dict[str, Any], index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = body["choices"][index]
    return found


def test_stop_strings_and_stop_ids(openmpi: Mpi, tmp_path: Path) -> None:
    free = choice(
        answers(openmpi, tmp_path, {"max_tokens": 24, "return_token_ids": True, "ignore_eos": True})[0]
    )
    text, ids = free["text"], free["token_ids"]
    assert free["finish_reason"] == "length"
    assert len(ids) == 24
    stop = text[9:12]
    at = text.index(stop)
    (tmp_path / "stops").mkdir()
    first_new = next(i for i in range(1, 24) if ids[i] not in ids[:i])
    by_text, by_id, neither = answers(
        openmpi,
        tmp_path / "stops",
        {"max_tokens": 24, "ignore_eos": True, "stop": ["never to be seen", stop]},
        {"max_tokens": 24, "ignore_eos": True, "stop_token_ids": [ids[first_new]], "return_token_ids": True},
        {"max_tokens": 24, "ignore_eos": True, "stop": ["never to be seen"]},
    )
    assert choice(by_text)["text"] == text[:at]
    assert choice(by_text)["finish_reason"] == "stop"
    assert choice(by_text)["stop_reason"] == stop
    assert choice(by_id)["token_ids"] == ids[: first_new + 1]
    assert choice(by_id)["finish_reason"] == "stop"
    assert choice(neither)["text"] == text


def test_choices_and_seeds(openmpi: Mpi, tmp_path: Path) -> None:
    warm = {"max_tokens": 16, "temperature": 1.2, "ignore_eos": True}
    lines = [
        {"custom_id": "a", **warm, "n": 3, "seed": 1},
        {"custom_id": "b", **warm, "n": 1, "seed": 1},
        {"custom_id": "c", **warm, "n": 1, "seed": 2},
    ]
    three, other, reseeded = answers(openmpi, tmp_path, *lines)
    texts = [one["text"] for one in three["choices"]] + [choice(other)["text"], choice(reseeded)["text"]]
    assert [one["index"] for one in three["choices"]] == [0, 1, 2]
    assert len(set(texts)) == len(texts)
    (tmp_path / "again").mkdir()
    again = answers(openmpi, tmp_path / "again", lines[2], lines[0], ranks=1)
    assert choice(again[0])["text"] == texts[4]
    assert [one["text"] for one in again[1]["choices"]] == texts[:3]


def test_twenty_alternatives_and_repetition_penalty(openmpi: Mpi, tmp_path: Path) -> None:
    plain, punished = answers(
        openmpi,
        tmp_path,
        {"max_tokens": 12, "logprobs": 20, "ignore_eos": True},
        {
            "max_tokens": 12,
            "logprobs": 20,
            "ignore_eos": True,
            "repetition_penalty": 100.0,
            "return_token_ids": True,
        },
    )
    for body in (plain, punished):
        logprobs = choice(body)["logprobs"]
        for own, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
            best = sorted(top.values(), reverse=True)
            # Two tokens may look alike; the chosen one is added if it is not among them.
            assert 19 <= len(best) <= 21
            assert own <= best[0] + 1e-6
            assert np.exp(best).sum() <= 1.0 + 1e-5
    greedy = choice(plain)["logprobs"]
    assert greedy["token_logprobs"] == pytest.approx([max(top.values()) for top in greedy["top_logprobs"]])
    ids = choice(punished)["token_ids"]
    assert len(set(ids)) == len(ids), "what was said before is a hundred times less likely"


def test_embeddings_of_each_pooling(openmpi: Mpi, tmp_path: Path) -> None:
    mean, last, raw = answers(
        openmpi,
        tmp_path,
        {"input": [PROMPT, "a lazy dog"], "pooling": "mean"},
        {"input": PROMPT, "pooling": "last"},
        {"input": PROMPT, "pooling": "last", "normalize": False},
    )
    vectors = [np.array(item["embedding"]) for body in (mean, last, raw) for item in body["data"]]
    assert [np.linalg.norm(vector) for vector in vectors[:3]] == pytest.approx([1, 1, 1], abs=1e-5)
    assert vectors[2] == pytest.approx(vectors[3] / np.linalg.norm(vectors[3]), abs=1e-6)
    assert not np.allclose(vectors[0], vectors[2], atol=1e-3)
    assert mean["usage"]["prompt_tokens"] > last["usage"]["prompt_tokens"]
