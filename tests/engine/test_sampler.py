"""Drawing: the walk over a short list is the walk over the whole row, and frequencies are the distribution's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpillm.engine.request import Request
from mpillm.engine.sampler import (
    FIRST_LOOK,
    Candidates,
    candidates_wanted,
    draw,
    inverse_temperature,
    weights_of,
)
from mpillm.engine.sequence import Sequence


def row(logits: np.ndarray, k: int, temperature: float = 1.0) -> Candidates:
    """The candidates that a row of logits gives, by the definition of each field."""
    order = np.lexsort((np.arange(len(logits)), -logits))[:k].astype(np.int32)
    exact = logits.astype(np.float64)
    inv_t = inverse_temperature(temperature)
    return Candidates(
        ids=order,
        values=logits[order],
        raw=logits[order],
        weights=weights_of(logits[order][None], np.array([inv_t]))[0],
        log_z=float(np.log(np.exp(exact - exact.max()).sum()) + exact.max()),
        scaled_z=float(np.exp((exact - exact.max()) * inv_t).sum()),
        complete=k >= len(logits),
    )


def request(**changes: float) -> Request:
    return Request("r", (1, 2), **changes)  # type: ignore[arg-type]


def reference(logits: np.ndarray, asked: Request) -> np.ndarray:
    """The distribution that temperature, min_p, top_k and top_p leave, in the order vLLM applies them."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / asked.temperature)
    order = np.lexsort((np.arange(len(p)), -p))
    p = p[order]
    p[p < asked.min_p * p[0]] = 0
    if asked.top_k > 0:
        p[asked.top_k :] = 0
    before = (np.cumsum(p) - p) / p.sum()
    p[before >= asked.top_p] = 0
    full = np.zeros_like(p)
    full[order] = p / p.sum()
    return full


FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.5, "min_p": 0.02, "top_p": 0.95},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.2},
]


@pytest.mark.parametrize("changes", FILTERS)
def test_frequencies_are_the_distributions(changes: dict[str, float]) -> None:
    rng = np.random.default_rng(len(changes))
    logits = rng.normal(0, 2, 300).astype(np.float32)
    asked = request(**{"temperature": 1.0, **changes})
    candidates = row(logits, 300, asked.temperature)
    # Evenly spaced u visit each token exactly in proportion to its probability.
    steps = 20_000
    counts = np.zeros(300)
    for u in (np.arange(steps) + 0.5) / steps:
        index = draw(candidates, asked, float(u))
        assert index is not None
        counts[candidates.ids[index]] += 1
    assert np.abs(counts / steps - reference(logits, asked)).max() < 2e-4


@pytest.mark.parametrize("changes", FILTERS)
def test_a_short_list_decides_what_the_whole_row_would_or_says_that_it_cannot(
    changes: dict[str, float],
) -> None:
    rng = np.random.default_rng(7)
    undecided = 0
    for _ in range(200):
        logits = rng.normal(0, rng.uniform(0.5, 4), 1000).astype(np.float32)
        asked = request(**{"temperature": 1.0, **changes})
        u = float(rng.random())
        whole = draw(row(logits, 1000, asked.temperature), asked, u)
        short = draw(row(logits, candidates_wanted(asked), asked.temperature), asked, u)
        undecided += short is None
        assert short in (whole, None)
        assert whole is not None
    if asked.top_k:
        assert undecided == 0


def test_greedy_takes_the_first_and_ties_go_to_the_lower_id() -> None:
    logits = np.array([1, 5, 5, 0], np.float32)
    candidates = row(logits, 1)
    assert draw(candidates, request(temperature=0.0), 0.0) == 0
    assert candidates.ids.tolist() == [1]
    assert candidates.logprob(0) == pytest.approx(5 - math.log(2 * math.exp(5) + math.e + 1))


def test_how_many_candidates_are_asked_for() -> None:
    assert candidates_wanted(request()) == 1
    assert candidates_wanted(request(logprobs=7)) == 7
    assert candidates_wanted(request(temperature=1.0)) == FIRST_LOOK
    assert candidates_wanted(request(temperature=1.0, top_k=500)) == 500


def test_each_request_has_its_own_stream() -> None:
    def stream(identity: str, **changes: int) -> list[float]:
        sequence = Sequence(Request(identity, (1,), max_tokens=50, **changes))
        numbers = []
        for token in range(20):
            numbers.append(sequence.uniform())
            sequence.append(token)
        return numbers

    base = stream("a", seed=3)
    assert base == stream("a", seed=3)
    others = [stream("b", seed=3), stream("a", seed=4), stream("a", seed=3, choice=1)]
    everything = [number for numbers in (base, *others) for number in numbers]
    assert len(set(everything)) == len(everything)
    assert all(0 <= number < 1 for number in everything)
