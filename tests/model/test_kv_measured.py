"""The trellis of the simulated KV caches of 4 bits."""

from __future__ import annotations

import numpy as np
import pytest

from tests.model.kv_measured import best_levels, best_path, mixing, on_trellis

ROWS = np.random.default_rng(7).standard_normal((300, 64)).astype(np.float32)


def test_a_trellis_loses_less_than_the_best_levels() -> None:
    levels = best_levels(16)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, ROWS)]
    found, errors = best_path(ROWS, np.full(64, 4), np.ones(64, np.float32))
    assert ((found - ROWS) ** 2).sum(1) == pytest.approx(errors, rel=1e-4)
    assert errors.sum() < 0.72 * ((nearest - ROWS) ** 2).sum()


def test_codes_of_four_bits_say_which_levels_were_chosen() -> None:
    """Decode as a reader would: the lowest bits of three codes choose the subset."""
    found, _ = best_path(ROWS, np.full(64, 4), np.ones(64, np.float32))
    levels = np.float32(0.9) * best_levels(32)
    at = np.searchsorted(levels, found)
    assert (levels[at] == found).all()
    u1, u2 = np.zeros(len(found), int), np.zeros(len(found), int)
    for subset in (at % 4).T:
        assert (subset % 2 == u1).all()
        u1, u2 = (subset // 2) ^ u2, u1


def test_scales_follow_the_rows() -> None:
    factors = np.exp2(np.linspace(-9, 9, len(ROWS)))[:, None].astype(np.float32)
    found = on_trellis(ROWS * factors, np.full(64, 4), np.ones(64, np.float32))
    errors = ((found / factors - ROWS) ** 2).mean(1)
    assert errors.mean() < 0.006
    assert errors.max() < 0.05


@pytest.mark.parametrize("n", [16, 24, 48])
def test_mixing_is_orthogonal_and_even(n: int) -> None:
    matrix = mixing(n)
    assert matrix @ matrix.T == pytest.approx(np.eye(n), abs=1e-6)
    assert np.abs(matrix).max() <= 1.5 / np.sqrt(n)
