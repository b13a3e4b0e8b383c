"""Waiting ends when it should and sleeps meanwhile."""

from __future__ import annotations

import time

import pytest

from mpillm.comm import waiting


@pytest.mark.parametrize("crowded", [False, True])
def test_long_waits_sleep(crowded: bool) -> None:
    begun, burnt = time.perf_counter(), time.thread_time()
    end = begun + 0.5
    waited = waiting.wait(lambda: time.perf_counter() > end, crowded)
    now = time.perf_counter()
    assert now > end
    assert 0 < waited < now - begun
    assert time.thread_time() - burnt < 0.1


@pytest.mark.parametrize("crowded", [False, True])
def test_asks_until_it_is_true(crowded: bool) -> None:
    answers = iter([False, None, 0, 7])
    assert waiting.wait(lambda: next(answers), crowded) > 0
    assert next(answers, "none left") == "none left"
    assert waiting.wait(lambda: True, crowded) == 0


def test_an_error_while_waiting_is_raised() -> None:
    def broken() -> bool:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        waiting.wait(broken, crowded=True)
