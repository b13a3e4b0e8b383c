"""Routers choose the experts that the papers' formulas choose, with the same bits on every path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels.router import Router, route

F32 = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


def wanted(logits: F32, router: Router, correction: F32 | None) -> tuple[Any, Any]:
    """One row in float64, expert by expert."""
    x = logits.astype(np.float64)
    scores = (
        np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        if router.scoring == "softmax"
        else 1 / (1 + np.exp(-x))
    )
    ranks = scores + (0 if correction is None else correction)
    size = len(x) // router.groups
    groups = [ranks[g * size : (g + 1) * size] for g in range(router.groups)]
    best = [sum(sorted(group)[-router.group_best :]) for group in groups]
    kept = sorted(range(router.groups), key=lambda g: (-best[g], g))[: router.groups_chosen]
    candidates = [e for e in range(len(x)) if router.groups == 1 or e // size in kept]
    ids = sorted(candidates, key=lambda e: (-ranks[e], e))[: router.chosen]
    weights = scores[ids] / (scores[ids].sum() if router.normalise else 1)
    return weights * router.scale, ids


ROUTERS = [
    (Router(2), None),
    (Router(4, normalise=False), None),
    (Router(8, "sigmoid", 4, 2, 2, scale=2.5), np.linspace(0.4, -0.4, 32).astype(np.float32)),
    (Router(3, "softmax", 8, 3, 1, normalise=False, scale=16.0), None),
    (Router(4, "softmax"), np.linspace(-0.2, 0.2, 32).astype(np.float32)),
]


@pytest.mark.parametrize(("router", "correction"), ROUTERS)
def test_a_router_chooses_what_its_formula_says(router: Router, correction: F32 | None) -> None:
    logits = (2 * np.random.default_rng(5).standard_normal((40, 32))).astype(np.float32)
    results = []
    for path in kernels.available():
        kernels.set_path(path)
        for threads in (1, 3):
            weights, ids = route(logits.copy(), router, correction, threads)
            for row in range(len(logits)):
                want, chosen = wanted(logits[row], router, correction)
                assert ids[row].tolist() == chosen
                np.testing.assert_allclose(weights[row], want, rtol=2e-6)
            if path != "numpy":
                results.append((weights, ids))
    for weights, ids in results:
        assert np.array_equal(weights, results[0][0])
        assert np.array_equal(ids, results[0][1])


def test_of_equals_the_lower_number_is_chosen() -> None:
    logits = np.zeros((2, 12), np.float32)
    for router in (Router(3), Router(3, "sigmoid", groups=4, groups_chosen=2)):
        weights, ids = route(logits.copy(), router)
        assert ids.tolist() == [[0, 1, 2]] * 2
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_sparsemixer_weighs_what_is_near_the_best_of_those_that_are_left() -> None:
    logits = np.array([[1.0, 2.0, 1.9, -3.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    weights, ids = route(logits, Router(2, "sparsemixer", jitter=0.05))
    assert ids.tolist() == [[1, 2], [0, 1]]
    near = 1 / (1 + np.exp(-0.1))  # of 2.0 and 1.9; nothing is near 1.9 once 2.0 is taken
    np.testing.assert_allclose(weights, [[near, 1.0], [1 / 4, 1 / 3]], rtol=1e-6)


def test_no_likely_expert_is_no_error() -> None:
    """Sigmoids of which all are 0: weights are 0, not NaN."""
    weights, ids = route(np.full((1, 4), -200, np.float32), Router(2, "sigmoid"))
    assert weights.tolist() == [[0, 0]]
    assert ids.tolist() == [[0, 1]]
