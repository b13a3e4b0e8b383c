"""How long replicas take for a job whose speeds the plan has wrong, or that change, beside the sum of their speeds.

The simulation has no noise: a run takes the same seconds each time.
"""

from __future__ import annotations

import pytest

from mpillm.planning.replica_steps import ReplicaSteps
from tests.run.simulated import SMOLLM2, STREAMED, Simulated, simulated

LINES = 320


def run(
    monkeypatch: pytest.MonkeyPatch,
    planned: list[float],
    actual: list[float],
    base: ReplicaSteps = SMOLLM2,
    lines: int = LINES,
    changes: tuple[float, list[float]] = (float("inf"), []),
    **more: object,
) -> Simulated:
    """Steps take `planned` times as long as those of `base` by the plan, and `actual` times as long in truth.

    From the first moment of `changes` on they take the times of its list.
    """
    total = sum(1 / times for times in planned)
    steps = [ReplicaSteps(base.maximum, base.rows, [times * one for one in base.times]) for times in planned]
    at, later = changes

    made = simulated(
        monkeypatch,
        steps,
        [
            lambda now, one=replica: (actual if now < at else later)[one] / planned[one]  # type: ignore[misc]
            for replica in range(len(planned))
        ],
        [1 / times / total for times in planned],
        lines,
        **more,  # type: ignore[arg-type]
    )
    assert sorted(map(int, made.answers)) == list(range(1, lines + 1))
    return made


@pytest.mark.parametrize(
    ("planned", "actual", "least"),
    [
        ([1, 3], [1, 3], 0.98),
        ([1, 1], [1, 1], 0.97),
        ([1, 1], [1, 3], 0.97),  # 0.87 where all lines are handed out at first
        ([1, 1.33], [1, 3], 0.97),
        ([1, 6], [1, 3], 0.97),
        ([1, 1], [3, 1], 0.97),  # rank 0 is the slow one
        ([1, 1, 1], [1, 1, 3], 0.88),  # 0.74
    ],
)
def test_replicas_reach_the_sum_of_their_speeds(
    planned: list[float], actual: list[float], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(monkeypatch, [1.0], [1.0])
    made = run(monkeypatch, planned, actual)
    speeds = sum(1 / times for times in actual)
    assert least < alone.seconds / made.seconds / speeds <= 1
    # A line that a replica has begun is computed anew by another one.
    again, rows = (
        sum(getattr(one, name) for one in made.totals.values()) for name in ("recomputed_tokens", "rows")
    )
    assert again < 0.05 * rows


def test_a_replica_that_is_ready_late_and_one_that_becomes_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(monkeypatch, [1.0], [1.0]).seconds
    late = run(monkeypatch, [1, 3], [1, 3], ready=[0, 1.5]).seconds
    assert late + (late - 1.5) / 3 < 1.02 * alone
    slowed = run(monkeypatch, [1, 1], [1, 1], changes=(5.0, [1, 3])).seconds
    assert slowed + 5 + (slowed - 5) / 3 < 1.2 * alone


def test_lines_are_not_held_back_where_steps_take_as_long_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each step reads the weights, whatever lines it has."""
    made = run(monkeypatch, [1, 1], [1, 1], STREAMED, lines=100, prompt=4)
    assert made.seconds < 1.1 * 32 * STREAMED.seconds(50)
