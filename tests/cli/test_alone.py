"""Commands that need no ranks need no MPI library either, and under mpiexec rank 0 alone runs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Mpi, clean_environment, run_bounded
from tests.job_helpers import CHAT

COMMANDS = {
    "plan": (["plan", ROOT / "jobs/quickstart.toml", "--model", CHAT, "--ranks", "2"], 0, "stages"),
    "init": (["init", "job", "job"], 0, "job/quickstart.toml"),
    "report": (["report", "."], 2, "There is no finished run in ."),
    "merge": (["merge", ".", "--output", "merged"], 2, "contains no output directory of a run"),
    "status": (["status", "."], 2, "No run has begun in . yet: it is empty."),
    "compare": (["compare", ".", "."], 2, "There are no results in ."),
    "pull": (["pull", "nothing-like-this"], 2, "nothing-like-this"),
    "worker": (["worker", "--port", "70000"], 2, "--port 70000 cannot be listened on"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_without_an_mpi_library(name: str, tmp_path: Path) -> None:
    words, code, said = COMMANDS[name]
    env = clean_environment(MPI4PY_LIBMPI=str(tmp_path / "libmpi.so"))
    done = run_bounded([sys.executable, "-m", "mpillm", *words], env=env, cwd=tmp_path)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr


def test_a_library_that_mpi4py_cannot_use(tmp_path: Path) -> None:
    """As Debian's MPICH, which PyPI's wheel of mpi4py cannot load: it is there, so its path needs no correction."""
    (tmp_path / "libmpi.so").write_bytes(b"no library")
    env = clean_environment(MPI4PY_LIBMPI=str(tmp_path / "libmpi.so"))
    done = run_bounded([sys.executable, "-m", "mpillm", "doctor"], env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        f"{tmp_path}/libmpi.so needs an mpi4py that is made for it, with its mpicc in PATH: pip"
        in done.stderr
    )
    assert "correct" not in done.stderr


@pytest.mark.parametrize("command", [["plan", ROOT / "jobs/quickstart.toml"], ["run"], ["doctor"]])
def test_without_mpi4py(command: list[str | Path], tmp_path: Path) -> None:
    """What needs no MPI does its work, and the rest says in one sentence what is missing."""
    (tmp_path / "mpi4py.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'mpi4py'\", name='mpi4py')"
    )
    alone = command[0] == "plan"
    words = [*command, "--model", CHAT] if alone else command
    env = clean_environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    done = run_bounded([sys.executable, "-m", "mpillm", *words], env=env, cwd=tmp_path)
    assert done.returncode == (0 if alone else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert ("mpi4py is missing" in done.stderr) != alone


@pytest.mark.mpiexec
def test_under_mpiexec_it_is_done_once(openmpi: Mpi, tmp_path: Path) -> None:
    done = openmpi.run(3, "-m", "mpillm", "init", "job", "job", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("quickstart.toml")) == (0, 1), done.stderr
