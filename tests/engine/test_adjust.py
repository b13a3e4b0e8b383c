"""Penalties, biases and masks: what the engine draws is what a NumPy reference draws from the model's own row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mpillm.engine.adjust import bits
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.engine.sampler import FORBIDDEN
from mpillm.engine.sequence import Sequence
from tests.model.engine_harness import run_engine, vocab_of
from tests.model.golden import model_path

MODEL = model_path("llama3")
VOCAB = vocab_of(MODEL)
PROMPT = tuple(np.random.default_rng(3).integers(0, VOCAB, 9).tolist())
EVEN = frozenset(range(0, VOCAB, 2))

SETTINGS: list[dict[str, Any]] = [
    {"presence_penalty": 2.0},
    {"presence_penalty": -1.0, "frequency_penalty": 1.5},
    {"frequency_penalty": -2.0},
    {"logit_bias": ((7, 6.0), (9, -100.0), (VOCAB - 1, 5.0))},
    {"allowed": bits(EVEN, VOCAB)},
    {"allowed": bits(frozenset({1, 2, VOCAB - 1}), VOCAB), "logit_bias": ((5, 100.0), (2, 1.0))},
    {"stop_ids": EVEN, "min_tokens": 11},
    {"bad_words": ((1, 2), (2, 4, 1), (4,), (8, 8)), "allowed": bits(frozenset({1, 2, 4, 8}), VOCAB)},
    {"top_p": 0.7, "min_p": 0.01, "logit_bias": tuple((token, 3.0) for token in range(20))},
    {"top_k": 4, "presence_penalty": 1.0, "allowed": bits(EVEN, VOCAB)},
]  # fmt: skip


def adjusted(row: np.ndarray, request: Request, generated: list[int]) -> np.ndarray:
    """vLLM's order: allowed ids, bad words, min_tokens, biases, penalties."""
    row = row.copy()
    if request.allowed is not None:
        allowed = np.unpackbits(request.allowed.view(np.uint8), bitorder="little")[: len(row)]
        row[allowed == 0] = -np.inf
    for *start, last in request.bad_words:
        if generated[len(generated) - len(start) :] == start:
            row[last] = -np.inf
    if len(generated) < request.min_tokens:
        row[list(request.stop_ids)] = -np.inf
    for token, bias in request.logit_bias:
        row[token] += bias
    for token in set(generated):
        row[token] -= request.presence_penalty + request.frequency_penalty * generated.count(token)
    return row


def drawn(row: np.ndarray, request: Request, u: float) -> int:
    """The token that `u` draws from a row of logits."""
    if request.temperature == 0:
        return int(np.argmax(row))
    p = np.exp((row - row.max()) / request.temperature)
    order = np.lexsort((np.arange(len(p)), -p))
    p = p[order]
    p[p < request.min_p * p[0]] = 0
    if request.top_k:
        p[request.top_k :] = 0
    p[(np.cumsum(p) - p) / p.sum() >= request.top_p] = 0
    return int(order[np.searchsorted(np.cumsum(p), u * p.sum(), side="right")])


def rows(completion: FinishedCompletion) -> np.ndarray:
    """The model's log-probabilities of all tokens at each generated one."""
    found = np.full((len(completion.tokens), VOCAB), np.nan)
    for row, top in zip(found, completion.top, strict=True):
        ids, values = zip(*top, strict=True)
        row[list(ids)] = values
    assert not np.isnan(found).any()
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.0])
def test_what_is_drawn(temperature: float) -> None:
    asked = [
        Request(f"r{i}", PROMPT, choice=seed, max_tokens=20, temperature=temperature, logprobs=VOCAB, **more)
        for i, more in enumerate(SETTINGS)
        for seed in range(3)
    ]
    found = run_engine(MODEL, asked)
    without = run_engine(MODEL, [replace(one, logprobs=None) for one in asked], max_num_seqs=3)
    plain = run_engine(
        MODEL,
        [Request(one.id, PROMPT, choice=one.choice, max_tokens=20, temperature=temperature) for one in asked],
    )
    assert [one.tokens for one in found] == [one.tokens for one in without]
    changed = [one.tokens != other.tokens[: len(one.tokens)] for one, other in zip(found, plain, strict=True)]
    assert sum(changed) > len(changed) * 0.7
    for request, completion in zip(asked, found, strict=True):
        state = Sequence(request)
        for row, token, logprob in zip(rows(completion), completion.tokens, completion.logprobs, strict=True):
            generated = state.tokens[len(PROMPT) :]
            assert token == drawn(adjusted(row, request, generated), request, state.uniform())
            assert logprob == row[token]
            state.append(token)
        assert len(completion.tokens) >= min(max(request.min_tokens, 1), 20)


def test_a_logit_that_is_forbidden_is_finite_at_any_temperature() -> None:
    coldest = np.float32(FORBIDDEN) * np.float32(100) * np.float32(1e5)
    assert np.isfinite(coldest)
    for temperature in (1e-6, 100.0):
        request = Request(
            "r", PROMPT, max_tokens=6, temperature=temperature, allowed=bits(frozenset({5, 6}), VOCAB)
        )
        assert set(run_engine(MODEL, [request])[0].tokens) <= {5, 6}


def test_when_all_is_forbidden_one_token_is_taken_all_the_same() -> None:
    request = Request(
        "r", PROMPT, max_tokens=3, temperature=1.0, allowed=bits(frozenset({5}), VOCAB), bad_words=((5,),)
    )
    assert len(run_engine(MODEL, [request])[0].tokens) == 3
