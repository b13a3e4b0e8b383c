"""Find out what launched this process, and whether that is the mpiexec of the loaded MPI library.

Under the mpiexec of another library each rank becomes a world of its own ("0 of 1"), and N copies of the job would
overwrite each other's output, or MPI_Init fails. This module words the error for both.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# With which users, launchers and Slurm (SIGUSR1: its warning) stop a run; some send several.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# The process id of mpiexec's supervisor, which shows what mpiexec writes, and says why it stops the ranks by SIGUSR1.
SUPERVISED = "MPILLM_SUPERVISED"
# Set for ranks that `mpillm launch` starts again after they have ended.
RESTARTED = "MPILLM_RESTARTED"

# Seconds from its start for which a rank stays that fails before MPI has begun: Open MPI's mpiexec then ends the other
# ranks, and hangs or crashes if one of them is connecting to it just then (PMIx 5.0, one in six on a busy machine).
STAY = 3.0
_begun = time.monotonic()

OPENMPI, MPICH = "Open MPI's mpiexec", "MPICH's mpiexec"

# The variables in which launchers pass the number of processes and a process's own number, most specific first.
# (SLURM_NTASKS is also set in batch scripts, where Python may run without a launcher.)
_LAUNCHERS = (
    (OPENMPI, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    (MPICH, "PMI_SIZE", "PMI_RANK"),
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
    """A launcher's name, the number of processes it started, this process's number, and the launcher's directory."""

    launcher: str
    size: int
    rank: int
    folder: str = ""


@dataclass(frozen=True)
class Library:
    """The MPI library that this process has loaded."""

    name: str  # "Open MPI", "MPICH", ...
    version: tuple[int, ...]
    build: str  # what MPI_Get_library_version says
    path: str = ""

    def __str__(self) -> str:
        at = f" ({self.path})" if self.path else ""
        return f"{self.name} {'.'.join(map(str, self.version))}{at}"

    def mpiexec(self) -> Path | None:
        """Return the mpiexec that was installed with this library; None if it is not found."""
        found = Path(self.path).parent.parent / "bin" / "mpiexec"
        return found if self.path and found.exists() else None


def launched_by(environ: Mapping[str, str], folder: str = "") -> Launch | None:
    """Return the launcher that the environment describes; None if it describes none."""
    for launcher, size, rank in _LAUNCHERS:
        if environ.get(size, "").isdecimal() and environ.get(rank, "").isdecimal():
            if size == "PMI_SIZE" and "SLURM_PROCID" in environ and "MPI_LOCALNRANKS" not in environ:
                launcher = "srun"  # srun speaks PMI too, but does not say what Hydra says
            return Launch(launcher, int(environ[size]), int(environ[rank]), folder)
    return None


def ranks_on_this_machine(environ: Mapping[str, str]) -> int:
    """Return the number of ranks on this machine according to the launcher; 0 if it does not tell."""
    said = (environ.get(name, "") for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"))
    return next((int(number) for number in said if number.isdecimal()), 0)


def to_continue(environ: Mapping[str, str]) -> str:
    """Return what a sentence on ranks that end tells the user to do: nothing if `launch` starts them again."""
    return "" if RESTARTED in environ else "; run the same command again to continue"


def end_all(started: Launch | None, code: int, environ: Mapping[str, str]) -> None:
    """Have mpiexec end all ranks when this one ends before MPI has begun: the others would wait for it.

    MPICH's is sent the message of MPI_Abort, in version 1 of PMI. Open MPI's ends them by itself; see `STAY`.
    """
    if started is None or started.size == 1:
        return
    if started.launcher == MPICH and environ.get("PMI_FD", "").isdecimal():
        with suppress(OSError):
            os.write(int(environ["PMI_FD"]), b"cmd=abort exitcode=%d\n" % code)
    if started.launcher == OPENMPI:
        time.sleep(max(0.0, _begun + STAY - time.monotonic()))


def starter_folder() -> str:
    """Return the directory of the parent process's program if that is an MPI launcher, else ""."""
    try:
        starter = os.readlink(f"/proc/{os.getppid()}/exe")
    except OSError:
        return ""
    return os.path.dirname(starter) if os.path.basename(starter) in STARTERS else ""


def mapped_files() -> list[str]:
    """Return the paths of the files that this process has mapped, once for each part; none if they are not visible."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return [line.split(maxsplit=5)[5] for line in lines if line.count("/")]


def loaded_library_path() -> str:
    """Return the path of the MPI library that this process has mapped; "" if it cannot be determined."""
    names = ("libmpi.so", "libmpi_abi.so", "libmpich.so", "libmpi_cray.so", "libmpi_gnu")
    return next((file for file in mapped_files() if os.path.basename(file).startswith(names)), "")


def cannot_meet(library: Library, launch: Launch | None, environ: Mapping[str, str]) -> bool:
    """Return whether MPI_Init would certainly fail or find no other rank, with messages that mislead."""
    if launch is None or launch.size == 1:
        return False
    pmix, pmi = "PMIX_RANK" in environ, "PMI_RANK" in environ or "PMI_FD" in environ
    if library.name == "MPICH":
        return pmix and not pmi and "pmix" not in library.build.lower()
    if library.name == "Open MPI":
        return pmi and not pmix and library.version >= (5,)  # Open MPI 5 speaks PMIx alone
    return False


def wrong_launcher(library: Library, launch: Launch) -> str:
    """Return the message for N worlds of one rank: the loaded library, the launcher, and the command that works."""
    started = f"{launch.launcher} ({launch.folder})" if launch.folder else launch.launcher
    return (
        f"{started} started {launch.size} ranks, but this Python has loaded another MPI, {library}, so the "
        f"ranks do not see each other. {_instead(library, launch)}"
    )


def other_library(library: Library, launch: Launch) -> str:
    """Return the message for a rank whose MPI is not that of the launcher and of rank 0."""
    return (
        f"{launch.launcher} started this rank, but its Python has loaded another MPI, {library}. Install the MPI of "
        "rank 0 on every host (or set MPI4PY_LIBMPI to its libmpi.so there)."
    )


def _instead(library: Library, launch: Launch) -> str:
    command = " ".join(["python", *_python_arguments()])
    # Why the ring: see slurm/run.sh.
    ring = "SLURM_PMIX_FENCE=ring srun --mpi=pmix"
    srun = ring if library.name == "Open MPI" else "srun --mpi=pmi2"
    mpiexec = library.mpiexec() or f"the mpiexec of {library.name}"
    if launch.launcher == "srun":
        return f"Type: {srun} -n {launch.size} {command} (or, instead of srun, {mpiexec})"
    return (
        f"Type: {mpiexec} -n {launch.size} {command} (or set MPI4PY_LIBMPI to the libmpi.so that belongs to "
        f"{launch.launcher})"
    )


def _python_arguments() -> list[str]:
    """Return the arguments of the running Python, quoted for a shell."""
    return [shlex.quote(word) for word in sys.orig_argv[1:]]
