"""Which launcher started a process, and which of them cannot serve which library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mpillm.comm import launch
from mpillm.comm.launch import Launch, Library, cannot_meet, launched_by, wrong_launcher

OPENMPI_STARTS = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}
MPICH_STARTS = {"PMI_SIZE": "4", "PMI_RANK": "1", "PMI_FD": "9", "MPI_LOCALNRANKS": "4"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
OPENMPI = Library("Open MPI", (5, 0, 11), "Open MPI v5.0.11")
MPICH = Library("MPICH", (5, 0, 2), "MPICH configure: --with-device=ch4")


@pytest.mark.parametrize(("environ", "expected"), [
    (OPENMPI_STARTS, Launch("Open MPI's mpiexec", 4, 1)),
    (MPICH_STARTS, Launch("MPICH's mpiexec", 4, 1)),
    (SLURM, Launch("srun", 4, 1)),
    ({**SLURM, "PMI_SIZE": "4", "PMI_RANK": "1"}, Launch("srun", 4, 1)),
    ({**SLURM, **MPICH_STARTS, "PMI_SIZE": "8"}, Launch("MPICH's mpiexec", 8, 1)),  # in a job, started by Hydra
    ({**SLURM, **OPENMPI_STARTS, "OMPI_COMM_WORLD_SIZE": "2"}, Launch("Open MPI's mpiexec", 2, 1)),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script that starts python itself
    ({"PMI_SIZE": "many", "PMI_RANK": "0"}, None),
    ({}, None),
])  # fmt: skip
def test_launched_by(environ: dict[str, str], expected: Launch | None) -> None:
    assert launched_by(environ) == expected


@pytest.mark.parametrize(("library", "environ", "never"), [
    (OPENMPI, OPENMPI_STARTS, False),
    (OPENMPI, MPICH_STARTS, True),
    (OPENMPI, {**SLURM, "PMIX_RANK": "1"}, False),
    (Library("Open MPI", (4, 1, 4), ""), MPICH_STARTS, False),  # may have been built for PMI: MPI_Init will tell
    (MPICH, MPICH_STARTS, False),
    (MPICH, OPENMPI_STARTS, True),
    (Library("MPICH", (4, 3, 0), "MPICH configure: --with-pmix=/usr"), OPENMPI_STARTS, False),
    (Library("Intel MPI", (2021, 1), ""), MPICH_STARTS, False),
    (MPICH, {}, False),
    (MPICH, {**OPENMPI_STARTS, "OMPI_COMM_WORLD_SIZE": "1"}, False),
])  # fmt: skip
def test_cannot_meet(library: Library, environ: dict[str, str], never: bool) -> None:
    assert cannot_meet(library, launched_by(environ), environ) == never


def test_what_to_type_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/some/python3", "-m", "mpillm", "run", "my job.toml"])
    for name in ("bin/mpiexec", "lib/libmpi.so.12"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    library = Library("MPICH", (5, 0, 2), "", str(tmp_path / "lib/libmpi.so.12"))
    assert wrong_launcher(library, Launch("Open MPI's mpiexec", 4, 0, "/opt/openmpi/bin")) == (
        "Open MPI's mpiexec (/opt/openmpi/bin) started 4 ranks, but this Python has loaded another MPI, "
        f"MPICH 5.0.2 ({library.path}), so the ranks do not see each other. Type: {tmp_path}/bin/mpiexec -n "
        "4 python -m mpillm run 'my job.toml' (or set MPI4PY_LIBMPI to the libmpi.so that belongs to Open "
        "MPI's mpiexec)"
    )
    sentence = wrong_launcher(OPENMPI, Launch("srun", 8, 0))
    assert sentence.startswith("srun started 8 ranks")
    assert sentence.endswith(
        "Type: SLURM_PMIX_FENCE=ring srun --mpi=pmix -n 8 python -m mpillm run 'my job.toml' "
        "(or, instead of srun, the mpiexec of Open MPI)"
    )
    assert "srun --mpi=pmi2 -n 8 " in wrong_launcher(library, Launch("srun", 8, 0))


def test_this_process_was_not_started_by_mpiexec() -> None:
    assert launch.starter_folder() == ""
    assert OPENMPI.mpiexec() is None


def test_open_mpi_is_given_time_to_connect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mpiexec hangs if it ends a rank that is just connecting to it."""
    slept: list[float] = []
    monkeypatch.setattr("mpillm.comm.launch.time.sleep", slept.append)
    monkeypatch.setattr("mpillm.comm.launch.time.monotonic", lambda: 100.5)
    monkeypatch.setattr("mpillm.comm.launch._begun", 100.0)
    for started in (None, Launch(launch.OPENMPI, 1, 0), Launch("srun", 4, 1), Launch(launch.OPENMPI, 4, 1)):
        launch.end_all(started, 2, {})
    assert slept == [launch.STAY - 0.5]
