"""Sums, pipes, orders and replies between real ranks, under both MPIs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import Mpi

PROGRAM = Path(__file__).with_name("collectives.py")
LATENCY = PROGRAM.with_name("latency.py")
pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_message_on_every_layout(mpi: Mpi, ranks: int) -> None:
    run = mpi.run(ranks, PROGRAM, timeout=60)
    assert run.returncode == 0, run.stderr
    assert sorted(re.findall(r"ok \d", run.stdout)) == [f"ok {rank}" for rank in range(ranks)]


def test_latencies_are_told(mpi: Mpi) -> None:
    """No bound: machines differ, and are shared."""
    run = mpi.run(2, LATENCY, timeout=60)
    assert run.returncode == 0, run.stderr
    figures = re.findall(r"2 ranks, .* microseconds: .*f32 \S+, q8_0 \S+", run.stdout)
    assert len(figures) == 2
    print(*figures, sep="\n")
