"""A few runs on ranks that differ, and what is drawn for those that are lost."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from mpillm import spec
from tests.conftest import Mpi, run_bounded
from tests.e2e.jobs import CHAT
from tests.unequal.drawing import settings_of


@pytest.mark.mpiexec
def test_a_few_runs(mpi: Mpi) -> None:
    done = mpi.run(2, "-m", "tests.unequal", "--runs", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 runs, 0 with other bytes (seed 1)" in done.stdout


def test_what_is_drawn_is_a_job(tmp_path: Path) -> None:
    draw, names = random.Random(1), ["pi", "nuc"]
    for ranks in (2, 4, 8) * 10:
        job = spec.load(None, settings_of(draw, ranks, names, CHAT, tmp_path), input="in", output="out")
        for rank in range(ranks):
            assert job.on_rank(rank, names[rank % 2]).memory.kv_bytes


@pytest.mark.mpiexec
def test_a_rank_is_lost(openmpi: Mpi) -> None:
    done = run_bounded([sys.executable, "-m", "tests.unequal.losses", "--runs", "1", "--seed", "363"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0:step:7:SIGKILL ok (1 death," in done.stdout
