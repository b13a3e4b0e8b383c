"""Who started this process, and is it the mpiexec of the MPI library that is loaded?

With the wrong mpiexec each rank becomes a world of its own ("0 of 1"), and N copies of the job would write over each
other; or the library gives up while it starts. Both are said here in a sentence.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Variables by which a launcher tells a process its number and how many there are; the most telling one first.
# (What Slurm's batch scripts have, SLURM_NTASKS, is no sign: python can run there without any launcher.)
_LAUNCHERS = (
    ("Open MPI's mpiexec", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH's mpiexec", "PMI_SIZE", "PMI_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("PALS", "PALS_SIZE", "PALS_RANKID"),
    ("Flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
)
STARTERS = (
    "hydra_pmi_proxy",
    "mpiexec.hydra",
    "mpiexec.gforker",
    "prterun",
    "prted",
    "orted",
    "mpiexec",
    "mpirun",
)


@dataclass(frozen=True)
class Launch:
    """What the launcher says: its name, how many processes it started, which of them this is, where it lies."""

    launcher: str
    size: int
    rank: int
    folder: str = ""


@dataclass(frozen=True)
class Library:
    """The MPI library this process has loaded."""

    name: str  # "Open MPI", "MPICH", ...
    version: tuple[int, ...]
    build: str  # what MPI_Get_library_version says
    path: str = ""

    def __str__(self) -> str:
        at = f" ({self.path})" if self.path else ""
        return f"{self.name} {'.'.join(map(str, self.version))}{at}"

    def mpiexec(self) -> Path | None:
        """The mpiexec that was installed together with this library, if it is where it should be."""
        found = Path(self.path).parent.parent / "bin" / "mpiexec"
        return found if self.path and found.exists() else None


def launched_by(environ: Mapping[str, str], folder: str = "") -> Launch | None:
    """What the environment says about the launcher; None if there is no sign of one."""
    for launcher, size, rank in _LAUNCHERS:
        if environ.get(size, "").isdecimal() and environ.get(rank, "").isdecimal():
            if size == "PMI_SIZE" and "SLURM_PROCID" in environ and "MPI_LOCALNRANKS" not in environ:
                launcher = "srun"  # srun speaks PMI too, but does not say what Hydra says
            return Launch(launcher, int(environ[size]), int(environ[rank]), folder)
    return None


def ranks_on_this_machine(environ: Mapping[str, str]) -> int:
    """How many ranks the launcher says it has started on this machine; 0 if it does not."""
    said = (environ.get(name, "") for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"))
    return next((int(number) for number in said if number.isdecimal()), 0)


def starter_folder() -> str:
    """The folder of the program that started this process, if that is an MPI launcher; else ""."""
    try:
        starter = os.readlink(f"/proc/{os.getppid()}/exe")
    except OSError:
        return ""
    return os.path.dirname(starter) if os.path.basename(starter) in STARTERS else ""


def loaded_library_path() -> str:
    """The file of the MPI library this process has mapped; "" if that cannot be seen."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ""
    files = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    names = ("libmpi.so", "libmpi_abi.so", "libmpich.so", "libmpi_cray.so", "libmpi_gnu")
    return next((file for file in files if os.path.basename(file).startswith(names)), "")


def cannot_meet(library: Library, launch: Launch | None, environ: Mapping[str, str]) -> bool:
    """True if it is known that MPI_Init would fail, or find no other rank and say confusing things."""
    if launch is None or launch.size == 1:
        return False
    pmix, pmi = "PMIX_RANK" in environ, "PMI_RANK" in environ or "PMI_FD" in environ
    if library.name == "MPICH":
        return pmix and not pmi and "pmix" not in library.build.lower()
    if library.name == "Open MPI":
        return pmi and not pmix and library.version >= (5,)  # Open MPI 5 speaks PMIx alone
    return False


def wrong_launcher(library: Library, launch: Launch) -> str:
    """The sentences for N worlds of one: what is loaded, what started it, and what to type instead."""
    started = f"{launch.launcher} ({launch.folder})" if launch.folder else launch.launcher
    return (
        f"{started} started {launch.size} ranks, but this Python has loaded another MPI, {library}, so that every rank "
        f"is alone. {_instead(library, launch)}"
    )


def _instead(library: Library, launch: Launch) -> str:
    command = " ".join(["python", *_python_arguments()])
    pmi = "pmix" if library.name == "Open MPI" else "pmi2"
    mpiexec = library.mpiexec() or f"the mpiexec of {library.name}"
    if launch.launcher == "srun":
        return f"Type: srun --mpi={pmi} -n {launch.size} {command} (or, instead of srun, {mpiexec})"
    return (
        f"Type: {mpiexec} -n {launch.size} {command} (or set MPI4PY_LIBMPI to the libmpi.so that belongs to "
        f"{launch.launcher})"
    )


def _python_arguments() -> list[str]:
    """The arguments of the running Python, as a person would type them."""
    return [shlex.quote(word) for word in sys.orig_argv[1:]]
