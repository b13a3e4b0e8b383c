"""A few runs on ranks that differ."""

from __future__ import annotations

import pytest

from tests.conftest import Mpi


@pytest.mark.mpiexec
def test_a_few_runs(mpi: Mpi) -> None:
    done = mpi.run(2, "-m", "tests.unequal", "--runs", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 runs, 0 with other bytes (seed 1)" in done.stdout
