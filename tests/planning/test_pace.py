"""How fast plain code runs, as a rank sees it at once."""

from __future__ import annotations

from pathlib import Path

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
