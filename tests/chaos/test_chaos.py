"""A short run of the chaos harness; `python -m tests.chaos --disturbances 500` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.harness import Chaos
from tests.conftest import Mpi


@pytest.mark.mpiexec
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_disturbances(openmpi: Mpi, tmp_path: Path) -> None:
    said: list[str] = []
    counts = Chaos(openmpi, tmp_path, seed=1, say=said.append).run(20)
    # Events between two starts are reported with those of the next start.
    assert counts.disturbances.total() >= 20
    assert not counts.wrong, "\n".join([*said, str(counts)])
    print(counts)
