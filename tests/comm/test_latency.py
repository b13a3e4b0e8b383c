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
    figures = re.findall(r"2 ranks, .* microseconds: .*f32 \S+, q8_0 \S+", run.stdout)
    assert len(figures) == 2
    print(*figures, sep="\n")
