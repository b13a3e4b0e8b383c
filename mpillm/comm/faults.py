"""Lost ranks: those that are left notice, agree, and go on as a smaller world.

MPI must be able to: Open MPI can, with ULFM (`mpiexec --with-ft ulfm`). It carries ranks that are killed. One that is
stopped is killed by its neighbours on the same machine, which makes it one that ULFM carries. What ULFM cannot carry
(a machine that is gone, a cut cable) ends the world by the deadline (see `deadline`), and so does an agreement that
does not come.
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

NEWS = 1.0  # seconds after a message has failed in which MPI must know of a lost rank, if that was the reason
LOOKED_AT = 4  # neighbours: more do not stop at once, and if so the deadline ends all
STOPPED = (
    3  # beats in which a neighbour must have been seen stopped, one after the other, before it is killed
)


class RankLost(Exception):
    """A rank has died. `World.shrink`, called by all others, lets them go on without it."""


def survivable(environ: Mapping[str, str]) -> bool:
    """Whether the launcher has started this world so that ranks may die in it."""
    return environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "ulfm", "mpi")


def is_loss(error: BaseException, comm: MPI.Intracomm) -> bool:
    """Whether this error, of an operation on `comm`, says that a rank was lost."""
    from mpi4py import MPI

    if isinstance(error, RankLost):
        return True
    if not isinstance(error, MPI.Exception):
        return False
    if error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED):
        return True
    # Of several requests at once, and of a step inside a nonblocking collective, it says no more than that one failed.
    vague = error.Get_error_class() in (MPI.ERR_IN_STATUS, MPI.ERR_OTHER, MPI.ERR_INTERN)
    return vague and _known(comm)


def _known(comm: MPI.Intracomm) -> bool:
    """Whether MPI knows of a loss, or hears of it in a moment: the message that failed may be faster than the news."""
    until = time.monotonic() + NEWS
    while not (comm.Is_revoked() or comm.Get_failed().Get_size() > 0):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@dataclass(frozen=True)
class Process:
    """A rank's process, as the others on its machine may look at it."""

    pid: int
    began: float  # a number is given again; this tells who has it
    namespace: int  # in which the number counts

    @classmethod
    def own(cls) -> Process:
        namespace = 0
        with contextlib.suppress(OSError):
            namespace = os.stat("/proc/self/ns/pid").st_ino
        return cls(os.getpid(), psutil.Process().create_time(), namespace)


class Neighbours:
    """The ranks behind this one on its machine: one that stays stopped is killed, for then the others can go on."""

    def __init__(self, own: Process, others: Sequence[Process]) -> None:
        """`others` are the other ranks of this machine, from the next one on."""
        self._stopped = {other: 0 for other in others[:LOOKED_AT] if other.namespace == own.namespace}

    def look(self) -> None:
        """Once a beat. Stopped is what the kernel says, not slow; a debugger's stop is another state."""
        for process in self._stopped:
            with contextlib.suppress(psutil.Error):
                found = psutil.Process(process.pid)
                stopped = found.create_time() == process.began and found.status() == psutil.STATUS_STOPPED
                self._stopped[process] = self._stopped[process] + 1 if stopped else 0
                if self._stopped[process] == STOPPED:
                    found.kill()


@contextlib.contextmanager
def bounded(seconds: float, speaker: str) -> Iterator[None]:
    """End this process with a sentence if the block takes longer; 0: let it take as long as it likes."""

    def give_up() -> None:
        sys.stderr.write(
            f"{speaker} The ranks that are left have not agreed within {seconds:.3g} s how to go on; "
            "the same command goes on from here.\n"
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
