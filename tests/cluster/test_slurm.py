"""The scripts in slurm/ on a real Slurm that the test starts on loopback, with both MPIs and both launchers."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm as tools
from tests.cluster.slurm import Slurm
from tests.conftest import ROOT, Mpi

pytestmark = [pytest.mark.slurm, pytest.mark.mpi, pytest.mark.timeout(180)]

NODES = ("n0", "n1", "n2", "n3")

# Stands for mpillm where the scripts themselves are looked at: says who it is, and can be made to wait.
STUB = '''
import os, signal, sys, time
from pathlib import Path
from mpi4py import MPI

told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
world = MPI.COMM_WORLD
nodes = world.allgather(os.environ.get("SLURMD_NODENAME", "?"))
world.Barrier()
if world.rank == 0:
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    print(f"ranks={world.size} nodes={','.join(sorted(set(nodes)))} cpus={cpus} words={sys.argv[1:]}", flush=True)
if "--wait" in sys.argv and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    Path(f"ready{world.rank}").touch()
    end = time.monotonic() + 60
    while not told and time.monotonic() < end:
        time.sleep(0.05)
    world.Barrier()
    sys.exit(75 if told else 3)
if "--fail" in sys.argv:
    sys.exit(int(sys.argv[-1]))
'''


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    reason = tools.missing()
    if reason:
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm"), NODES, cpus=2).running() as running:
        yield running


def place(folder: Path, mpi: Mpi) -> None:
    """Make a directory to type sbatch in: the repository's scripts, and a .venv that has this MPI."""
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, target in {"python": Path(sys.executable), "mpiexec": mpi.mpiexec}.items():
        program = binaries / name
        program.write_text(f'#!/bin/sh\nexec "{target}" "$@"\n')
        program.chmod(0o755)
    settings = [f'export {name}="{value}"' for name, value in {**mpi.env, "PYTHONPATH": str(ROOT)}.items()]
    (binaries / "activate").write_text("\n".join([f'PATH="{binaries}:$PATH"', *settings]) + "\n")


@pytest.fixture
def stub(tmp_path: Path, mpi: Mpi) -> Path:
    place(tmp_path, mpi)
    (tmp_path / "mpillm").mkdir()
    (tmp_path / "mpillm" / "__init__.py").touch()
    (tmp_path / "mpillm" / "__main__.py").write_text(STUB)
    return tmp_path


Submit = Callable[..., tools.Job]


@pytest.fixture
def submit(slurm: Slurm) -> Submit:
    def type_and_wait(folder: Path, *words: str, env: dict[str, str] | None = None) -> tools.Job:
        job = slurm.submit("--output=log", *words, cwd=folder, env=env)
        return slurm.wait(job, folder / "log")

    return type_and_wait


@pytest.mark.parametrize("launcher", ["", "srun", "mpiexec"])
def test_one_node(stub: Path, submit: Submit, launcher: str) -> None:
    options = ["--ntasks=2", "--cpus-per-task=1"]
    job = submit(stub, *options, "slurm/one-node.sbatch", "job.toml", "--set", "a=b c", env={"MPILLM_LAUNCHER": launcher})
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert re.search(r"ranks=2 nodes=n\d cpus=1 words=\['run', 'job.toml', '--set', 'a=b c'\]", job.log), job.log
    assert ("srun --mpi=" in job.log) is (launcher != "mpiexec"), job.log


@pytest.mark.parametrize("launcher", ["srun", "mpiexec"])
def test_many_nodes(stub: Path, submit: Submit, launcher: str) -> None:
    job = submit(
        stub, "--nodes=3", "--cpus-per-task=2", "slurm/many-nodes.sbatch", "job.toml", env={"MPILLM_LAUNCHER": launcher}
    )
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.log
    assert re.search(r"ranks=3 nodes=n\d,n\d,n\d cpus=2 ", job.log), job.log
