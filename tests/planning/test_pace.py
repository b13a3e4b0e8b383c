"""How fast plain code runs, as a rank sees it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpillm.planning import pace


def test_a_core_that_others_use_too_counts_in_part(tmp_path: Path) -> None:
    waited = tmp_path / "schedstat"
    for text, part in (("300 600 9\n", 1 / 3), ("950 50 1\n", 1.0), ("0 0 0\n", 1.0), ("?", 1.0)):
        waited.write_text(text)
        assert pace.part_so_far(waited) == pytest.approx(part)
    assert pace.part_so_far(tmp_path / "missing") == 1.0  # not Linux


def test_it_is_that_of_this_machine() -> None:
    assert 0 < pace.pace() < 100
