"""Layers with a window keep only the window's blocks: sequences many times as long, against the independent oracle."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from mpillm.engine.request import FinishedCompletion, Request
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_needed
from tests.model.engine_harness import _alone, run_laid_out
from tests.model.golden import model_path
from tests.model.oracle import Oracle

# All layers have a window of 9, or 20, or 40; two of four have one of 12.
MODELS = ["mistral", "mixtral_window", "qwen3_window", "qwen2_window"]
LENGTH = 12 * KV_BLOCK + 5  # of the longest request


@functools.cache
def requests(model: str) -> list[Request]:
    vocab = Oracle(model_path(model)).config["vocab_size"]
    rng = np.random.default_rng(8)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab, count).tolist())

    shared = ids(150)
    return [
        Request("long", ids(LENGTH), max_tokens=0, prompt_logprobs=0),
        *(Request(f"shared-{i}", shared + ids(7 + i), max_tokens=30 + 40 * i, logprobs=1) for i in range(4)),
        Request("short", shared[:64], max_tokens=20, temperature=1.0, logprobs=0),
        Request("mean", shared + ids(100), kind="embed", pooling="mean"),
    ]


def run(model: str, **job: Any) -> tuple[list[tuple[Any, ...]], Any]:
    completions, session = run_laid_out(_alone(), model_path(model), requests(model), max_context=512, **job)
    return list(map(_values, completions)), session


def _values(one: FinishedCompletion) -> tuple[Any, ...]:
    embedding = None if one.embedding is None else one.embedding.tobytes()
    return one.tokens, one.logprobs, one.top, one.prompt_logprobs, embedding


@functools.cache
def expected(model: str) -> list[tuple[Any, ...]]:
    return run(model, max_num_seqs=1, prefix_sharing=False, threads=1)[0]


@pytest.mark.parametrize("model", MODELS)
def test_the_oracle_sees_the_same(model: str) -> None:
    oracle = Oracle(model_path(model))
    (_, _, _, logprobs, _), *_ = expected(model)
    prompt = requests(model)[0].prompt
    rows = oracle.logprobs(list(prompt))
    found = [rows[i, token] for i, token in enumerate(prompt[1:])]
    assert len(logprobs) == LENGTH - 1
    np.testing.assert_allclose(logprobs, found, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "job",
    [{}, {"max_num_batched_tokens": 1, "max_num_seqs": 1}, {"max_num_batched_tokens": 70, "threads": 2}],
)
@pytest.mark.parametrize("model", MODELS)
def test_any_cut_gives_the_same(model: str, job: dict[str, Any]) -> None:
    assert run(model, **job)[0] == expected(model)


@pytest.mark.parametrize("model", MODELS)
def test_a_tight_cache_holds_more_than_it_has_blocks_for(model: str) -> None:
    """Sequences of up to 13 blocks in all layers, where those with a window find room for a few."""
    _, session = run(model)
    windows, block = session.limits.windows, session.caches[0].block_nbytes
    needed = blocks_needed(LENGTH, windows)
    assert needed < 13 * len(windows)
    job: dict[str, Any] = {"kv": block * (needed + 1), "max_num_batched_tokens": 64}
    for prefix_sharing in (True, False):
        found, session = run(model, **job, prefix_sharing=prefix_sharing)
        assert session.limits.n_blocks == needed + 1
        assert session.kv.peak <= block * (needed + 1)
        assert found == expected(model)
