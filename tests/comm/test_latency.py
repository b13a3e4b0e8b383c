"""The program that measures latencies by hand runs under both MPIs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import Mpi

PROGRAM = Path(__file__).with_name("latency.py")


@pytest.mark.mpiexec
def test_latencies_are_told(mpi: Mpi) -> None:
    """No bound: machines differ, and are shared."""
    run = mpi.run(2, PROGRAM)
    assert run.returncode == 0, run.stderr
    gathers = r"gather by messages \S+, gather by MPI's Iallgather \S+, gather by MPI's Allgather_init \S+"
    figures = re.findall(rf"2 ranks, .* microseconds: {gathers}, .*f32 \S+, sum by q8_0 \S+", run.stdout)
    assert len(figures) == 3
    print(*figures, sep="\n")
