"""Our own exp and log: as near as the C library's, and the same bits one by one as in arrays of any length."""

from __future__ import annotations

import math

import numpy as np

from mpillm.engine import exact


def ulps(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs) / np.spacing(np.abs(theirs))))


def test_exp() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-700, 700, 20_000), rng.normal(0, 1, 20_000), np.linspace(-1, 1, 1001)])
    ours = exact.exp(x)
    assert ulps(ours, np.array([math.exp(value) for value in x])) <= 1.0
    assert [float(exact.exp(np.array([value]))[0]) for value in x[::97]] == ours[::97].tolist()
    assert exact.exp(np.array([0.0, -0.0, -1e4, -np.inf])).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_log() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.exp(rng.uniform(-700, 700, 20_000)), rng.uniform(0.4, 3, 20_000)])
    ours = exact.log(x)
    assert ulps(ours, np.array([math.log(value) for value in x])) <= 1.0
    assert [float(exact.log(np.array([value]))[0]) for value in x[::97]] == ours[::97].tolist()
    assert exact.log(np.array([1.0, 2.0, 1024.0])).tolist() == [0.0, math.log(2), math.log(1024)]
