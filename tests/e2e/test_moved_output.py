"""The output directory is moved or deleted while a run writes to it: noticed soon, and no other job is touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Mpi
from tests.e2e.jobs import command, mixed_lines, results, run, write_lines
from tests.e2e.test_resume import wait_for_results

pytestmark = pytest.mark.mpiexec
SETTINGS = ["batch.max_num_seqs=2"]


def said_by(launcher: subprocess.Popen[str]) -> str:
    try:
        return launcher.communicate()[1]
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_the_run_stops_and_says_where_its_journal_is(how: str, openmpi: Mpi, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(200, seed=4, tokens=60))
    other = write_lines(tmp_path / "other.jsonl", mixed_lines(4, seed=5))
    output, away = tmp_path / "out", tmp_path / "away"
    launcher = subprocess.Popen(
        [str(word) for word in openmpi.command(2, *command(source, output, *SETTINGS))],
        env=openmpi.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_results(output / "journal", launcher, 4000)
    if how == "moved":
        output.rename(away)
    else:
        shutil.rmtree(output)
    answered = run(openmpi, 1, other, output)
    assert answered.returncode == 0, answered.stderr
    said = said_by(launcher)
    assert launcher.returncode == 75, said
    if how == "moved":
        assert f"was moved during the run; its journal is now {away}/journal" in said
        assert run(openmpi, 2, source, away).returncode == 0
        assert run(openmpi, 1, source, tmp_path / "undisturbed").returncode == 0
        for name in ("results.jsonl", "results.h5"):
            assert (away / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    else:
        assert "was deleted during the run, with the journal" in said
    assert len(results(output)) == 4


def test_the_supervisor_does_not_begin_anew(openmpi: Mpi, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(400, seed=4, tokens=60))
    output = tmp_path / "out"
    words = command(source, output, *SETTINGS)
    launcher = subprocess.Popen(
        [sys.executable, *words[:2], "launch", "-n", "1", *words[2:]],
        env=openmpi.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_results(output / "journal", launcher, 4000)
    output.rename(tmp_path / "away")
    said = said_by(launcher)
    assert launcher.returncode == 75, said
    assert f"The output directory {output} was moved or deleted; the run stops." in said
    assert not output.exists()
