"""Which rank the others wait for, by the reports of all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mpillm.run import balance
from mpillm.run.balance import Balance, Busy
from mpillm.run.progress import Slowest


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(balance, "time", clock)
    return clock


def compared(hosts: tuple[str, ...]) -> tuple[Balance, Any]:
    """Balance of a session of a rank on each host, and the clock of rank 0's own work."""
    own = SimpleNamespace(seconds=0.0)
    nothing = SimpleNamespace(seconds=0.0)
    session = SimpleNamespace(
        machines=SimpleNamespace(speeds=[None] * len(hosts)),
        choice=SimpleNamespace(rank_seconds=lambda *_: [1.0] * len(hosts)),
        chosen=None,
        replicas=[SimpleNamespace(ranks=range(len(hosts)))],
        world=SimpleNamespace(size=len(hosts), hosts=hosts),
        worker=own,
        counters=SimpleNamespace(all_reduce=nothing, pipe=nothing),
    )
    return Balance(session), own  # type: ignore[arg-type]


def test_the_rank_that_computes_longest_is_named(clock: Clock) -> None:
    ranks, own = compared(("pi1", "pi2", "pi3"))
    assert ranks.slowest() is None
    for second in range(1, 10):
        # Reports come late; rank 0 has its own at any moment.
        clock.now = 100.0 + second
        ranks.note(1, Busy(0.5 * second))
        ranks.note(2, Busy(0.9 * second))
        clock.now += 0.6
        own.seconds = 0.5 * (second + 0.6)
        told = ranks.slowest()
        assert (told is None) == (second + 0.6 < balance.SOON)
    assert told is not None
    assert told.name == "rank 2 on pi3"
    assert told.busy == pytest.approx(0.9)


def test_a_new_window_forgets(clock: Clock) -> None:
    ranks, own = compared(("here", "here"))
    clock.now, own.seconds = 110.0, 9.0
    ranks.note(1, Busy(5.0))
    assert ranks.slowest() == Slowest("rank 0", pytest.approx(0.9))
    assert ranks.look(lambda: 0.0) is None
    clock.now = 112.0
    ranks.note(1, Busy(7.0))
    assert ranks.slowest() == Slowest("rank 0", pytest.approx(0.9))  # as before: the window has just begun
    clock.now, own.seconds = 115.0, 11.0
    ranks.note(1, Busy(9.5))
    assert ranks.slowest() == Slowest("rank 1", pytest.approx(0.9))


def test_equal_ranks_have_no_slowest(clock: Clock) -> None:
    ranks, own = compared(("a", "b"))
    clock.now, own.seconds = 105.0, 4.0
    ranks.note(1, Busy(4.3))
    assert ranks.slowest() is None
