"""How fast plain code runs, as a rank sees it at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mpillm.comm import core_speed
from mpillm.planning import pace


def test_a_core_that_others_use_too_counts_in_part(tmp_path: Path) -> None:
    waited = tmp_path / "schedstat"
    for text, part in (("300 600 9\n", 1 / 3), ("950 50 1\n", 1.0), ("0 0 0\n", 1.0), ("?", 1.0)):
        waited.write_text(text)
        assert core_speed.part_so_far(waited) == pytest.approx(part)
    assert core_speed.part_so_far(tmp_path / "missing") == 1.0  # not Linux


def test_it_is_that_of_this_machine() -> None:
    assert 0 < core_speed.pace() < 100


def test_hosts_that_are_about_as_fast_are_alike() -> None:
    """A share of the lines for each of them must not depend on noise."""
    speeds = list(pace.by_pace((0.9, 1.0, 0.33, 0.9), [1, 1, 1, 1]))
    assert speeds[0] is speeds[1] is speeds[3]
    assert [speed.core for speed in speeds] == pytest.approx([1.0, 1.0, 0.33, 1.0])
    assert speeds[0].memory == pytest.approx(speeds[2].memory / 0.33)
    assert [speed.memory for speed in pace.by_pace((1.0, 1.0), [2])] == [speeds[0].memory / 2] * 2


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_a_call_in_which_the_core_is_taken_away_does_not_count(
    stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it lasts longer than all calls may, and takes a thousand times as long by the thread's own clock."""
    made, clock = list[int](), SimpleNamespace(wall=0.0, thread=0.0)

    def call(_: int) -> None:
        taken = (0.3, 0.16) if len(made) == 1 + stopped else (0.0004, 0.0004)
        made.append(0)
        clock.wall, clock.thread = clock.wall + taken[0], clock.thread + taken[1]

    times = SimpleNamespace(perf_counter=lambda: clock.wall, thread_time=lambda: clock.thread)
    monkeypatch.setattr(core_speed, "time", times)
    assert core_speed.typical(call, [0], 0.005) == pytest.approx(0.0004)
