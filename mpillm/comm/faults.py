"""Lost ranks: the surviving ranks notice the loss, agree on it, and continue as a smaller world.

This needs Open MPI with ULFM (`mpiexec --with-ft ulfm`), which handles ranks that are killed. A stopped rank is killed
by its neighbours on the same machine, so that ULFM handles it too. What ULFM cannot handle (a dead machine, a cut
cable) ends the world by the deadline (see `deadline`), and so does an agreement that is not reached.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from mpillm.errors import Interrupted

if TYPE_CHECKING:
    from mpi4py import MPI

# Seconds after a failed message in which MPI must know of a lost rank, if that is the reason.
CONFIRMATION = 5.0
WATCHED = 4  # neighbours; if more ranks stop at once, the deadline ends the world
STOPPED = 3  # consecutive beats in which a neighbour must be stopped before it is killed


class RankLost(Exception):
    """A rank has died. `World.shrink`, called by all others, lets them continue without it."""


def survivable(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher started this world so that it survives lost ranks."""
    return environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "ulfm", "mpi")


def is_loss(error: BaseException, comm: MPI.Intracomm) -> bool:
    """Return whether this error of an operation on `comm` means that a rank was lost."""
    from mpi4py import MPI

    if isinstance(error, RankLost):
        return True
    if not isinstance(error, MPI.Exception):
        return False
    if error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED):
        return True
    # For several requests at once, and inside a nonblocking collective, MPI reports only that one of them failed.
    vague = error.Get_error_class() in (MPI.ERR_IN_STATUS, MPI.ERR_OTHER, MPI.ERR_INTERN)
    return vague and known(comm)


def known(comm: MPI.Intracomm) -> bool:
    """Return whether MPI knows of a loss or learns of it soon: the failed message may arrive before the news."""
    until = time.monotonic() + CONFIRMATION
    while not (comm.Is_revoked() or comm.Get_failed().Get_size() > 0):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@dataclass(frozen=True)
class Process:
    """A rank's process, as other ranks on its machine identify it."""

    pid: int
    began: float  # start time: the system reuses process numbers
    namespace: int  # the namespace of the process number

    @classmethod
    def own(cls) -> Process:
        namespace = 0
        with contextlib.suppress(OSError):
            namespace = os.stat("/proc/self/ns/pid").st_ino
        return cls(os.getpid(), psutil.Process().create_time(), namespace)


class Neighbours:
    """The next ranks on this machine: one that stays stopped is killed, so that the others can continue."""

    def __init__(self, own: Process, others: Sequence[Process]) -> None:
        """`others` are the other ranks of this machine, starting with the next one."""
        self._stopped = {other: 0 for other in others[:WATCHED] if other.namespace == own.namespace}

    def look(self) -> None:
        """Kill neighbours that stay stopped; called once a beat. A process that a debugger stops has another state."""
        for process in self._stopped:
            with contextlib.suppress(psutil.Error):
                found = psutil.Process(process.pid)
                stopped = found.create_time() == process.began and found.status() == psutil.STATUS_STOPPED
                self._stopped[process] = self._stopped[process] + 1 if stopped else 0
                if self._stopped[process] == STOPPED:
                    found.kill()


@contextlib.contextmanager
def bounded(seconds: float, speaker: str) -> Iterator[None]:
    """End this process with a message if the block takes longer; 0 means no limit."""

    def give_up() -> None:
        sys.stderr.write(
            f"{speaker} The remaining ranks have not agreed within {seconds:.3g} s how to continue; run the "
            "same command again to continue.\n"
        )
        sys.stderr.flush()
        os._exit(Interrupted.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
