"""LongRoPE: a sequence beyond its border has other keys from its first token on, whatever it is computed with."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mpillm import kernels
from mpillm.engine.request import FinishedCompletion, PartialCompletion, Request
from mpillm.kernels import KV_BLOCK

from .engine_harness import _alone, run_engine, run_laid_out, vocab_of
from .golden import model_path

MODEL = model_path("phi3_long")
BORDER = 40

pytestmark = pytest.mark.skipif(kernels.path() == "numpy", reason="NumPy's products promise less")


@functools.cache
def requests() -> list[Request]:
    """Sequences on both sides of the border and across it; most begin with the same block."""
    draw = np.random.default_rng(4)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, vocab_of(MODEL), count).tolist())

    start = ids(KV_BLOCK + 2)
    scored = start + ids(3)
    repeated = ids(4) * 9
    return [
        Request("below", start, max_tokens=3, logprobs=1),
        Request("beyond", start + ids(30), max_tokens=5, logprobs=1),
        Request("across", start + ids(2), max_tokens=40, logprobs=1),
        Request("sampled", start, max_tokens=30, temperature=1.5, repetition_penalty=1.2, seed=3),
        Request("at", start + ids(BORDER - KV_BLOCK - 2), max_tokens=1, logprobs=1),
        Request("drafted", repeated, max_tokens=60, logprobs=0),
        Request("echo", start + ids(4), max_tokens=9, prompt_logprobs=1, logprobs=1),
        # Two continuations of one prompt that are scored, the second beyond the border.
        Request("choices", scored, max_tokens=0, prompt_logprobs=0, score_from=len(start), followed=True),
        Request("choices", scored + ids(9), choice=1, max_tokens=0, prompt_logprobs=0, score_from=len(start)),
        Request("mean", start + ids(BORDER), kind="embed", pooling="mean"),
    ]


def values(one: FinishedCompletion) -> tuple[Any, ...]:
    embedding = None if one.embedding is None else one.embedding.tobytes()
    return one.tokens, one.logprobs, one.top, one.prompt_logprobs, embedding


@functools.cache
def alone() -> list[tuple[Any, ...]]:
    """What each request's answer is without any other."""
    return [values(run_engine(MODEL, [replace(request, followed=False)])[0]) for request in requests()]


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"prefix_sharing": False},
        {"max_num_batched_tokens": 5, "max_num_seqs": 3},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"speculation": "prompt-lookup", "threads": 2},
    ],
    ids=str,
)
def test_an_answer_does_not_depend_on_what_it_is_computed_with(job: dict[str, Any]) -> None:
    assert list(map(values, run_engine(MODEL, requests(), **job))) == alone()


def test_a_tight_cache() -> None:
    _, session = run_laid_out(_alone(), MODEL, [])
    kv = 4 * KV_BLOCK * session.kv_token_nbytes
    found, session = run_laid_out(_alone(), MODEL, requests(), kv=kv)
    assert session.limits.n_blocks == 4
    assert list(map(values, found)) == alone()


@pytest.mark.parametrize("generated", [1, 4, 5, 20])
def test_a_run_goes_on_on_both_sides(generated: int) -> None:
    request, whole = requests()[2], alone()[2]
    tokens, logprobs, top = (part[:generated] for part in whole[:3])
    resumed = PartialCompletion(tokens=tokens, logprobs=logprobs, top=top)
    assert values(run_engine(MODEL, [replace(request, resumed=resumed)])[0]) == whole


def test_the_border_counts() -> None:
    """The same tokens have other log-probabilities when further ones follow beyond the border."""
    by_id = {request.id: request for request in requests()}
    prompt = by_id["mean"].prompt
    short, long = run_engine(
        MODEL,
        [
            Request(str(count), prompt[:count], max_tokens=0, prompt_logprobs=0)
            for count in (BORDER, BORDER + 1)
        ],
    )
    assert len(short.prompt_logprobs) == BORDER - 1
    assert np.abs(np.subtract(short.prompt_logprobs, long.prompt_logprobs[:-1])).max() > 0.01
