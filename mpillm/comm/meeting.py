"""The start, until all ranks have met: MPI_Init waits for all of them without limit, and no heartbeats run yet.

A thread of every rank ends its process when that takes too long, and as soon as a rank that the launcher started on
the same machine is stopped or gone, which nobody else would notice. (Without ULFM the launcher ends all ranks when one
is gone.)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
import time
from types import ModuleType

import psutil

from mpillm.comm import launch
from mpillm.comm.faults import STOPPED
from mpillm.errors import Interrupted


class Meeting:
    """Watches the start of the ranks until `over` is called."""

    def __init__(self, limit: float, beat: float, kill: bool) -> None:
        """`limit`: seconds that the ranks may take; `kill`: kill a stopped rank, because the launcher will not."""
        self._limit, self._beat, self._kill = limit, beat, kill
        self._local = _LocalRanks()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meeting", daemon=True)
        self._thread.start()

    def over(self) -> None:
        """Stop watching: the ranks have met, or will not meet."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        remaining = self._limit  # counted in own beats: a rank that was stopped itself blames nobody
        while not self._over.wait(self._beat):
            remaining -= self._beat
            if self._local.look() or remaining <= 0:
                self._end()

    def _end(self) -> None:
        local = self._local
        if local.reports:
            what = (
                f"Not all ranks connected within {self._limit:g} s: a rank does not start, its machine is "
                "down, or "
            )
            what += "the network is interrupted"
            if local.incomplete:
                what = (
                    f"A rank on {socket.gethostname()} was stopped or ended before all ranks were connected"
                )
            sys.stderr.write(f"mpillm: {what}{launch.to_continue(os.environ)}.\n")
            sys.stderr.flush()
        # When a rank ends, the launcher may end all: the reporting rank must write first. It waits as well, because a
        # rank that looks late would take it for lost and report too.
        time.sleep(2 * self._beat)
        for process in local.lost if self._kill else ():
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(Interrupted.exit_code)


class _LocalRanks:
    """The other ranks that the launcher started on this machine, as far as the kernel shows them."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._words = self._own.cmdline()
        self._launcher = self._own.parent() if launch.starter_folder() else None
        self._size = launch.ranks_on_this_machine(os.environ)
        self._stopped: dict[psutil.Process, int] = {}  # consecutive looks in which a rank was stopped
        self._too_few = 0  # consecutive looks that found fewer processes than were started
        self.lost: list[psutil.Process] = []
        self.look()

    def look(self) -> bool:
        """Return whether one of them is stopped or gone; called once a beat."""
        if self._launcher is not None:
            with contextlib.suppress(psutil.Error):
                self._see(self._launcher.children())
        for rank in self._stopped:
            status = _status(rank)
            self._stopped[rank] = self._stopped[rank] + 1 if status == psutil.STATUS_STOPPED else 0
            if status == psutil.STATUS_DEAD or self._stopped[rank] == STOPPED:
                self.lost.append(rank)
        return self.incomplete

    def _see(self, children: list[psutil.Process]) -> None:
        alive = [child for child in children if _status(child) != psutil.STATUS_DEAD]
        # A rank may have ended before the first look; another child of the launcher then counts in its place.
        self._too_few = self._too_few + 1 if len(alive) < self._size else 0
        for child in alive:
            with contextlib.suppress(psutil.Error):
                if child != self._own and child not in self._stopped and child.cmdline() == self._words:
                    self._stopped[child] = 0

    @property
    def incomplete(self) -> bool:
        """Whether not all of them will start."""
        return bool(self.lost) or self._too_few >= STOPPED

    @property
    def reports(self) -> bool:
        """Whether this rank reports the reason: one rank of each machine does."""
        return all(self._own.pid < rank.pid for rank in self._stopped if rank not in self.lost)


def _status(process: psutil.Process) -> str:
    """Return the status of a process; an ended one is dead."""
    status: str = psutil.STATUS_DEAD
    with contextlib.suppress(psutil.Error):
        status = process.status()
    return psutil.STATUS_DEAD if status == psutil.STATUS_ZOMBIE else status


def initialise(mpi: ModuleType, library: str) -> None:
    """Call MPI_Init_thread, and let errors become exceptions; `library` is the file that is loaded.

    mpi4py holds Python's lock while the ranks wait for each other; this call does not, so that threads run meanwhile.
    """
    if not library:  # not Linux, most likely
        mpi.Init_thread(mpi.THREAD_FUNNELED)
        return
    provided = ctypes.c_int()
    # Only the main thread calls MPI; the others read and compute.
    ctypes.CDLL(library).MPI_Init_thread(
        None, None, ctypes.c_int(mpi.THREAD_FUNNELED), ctypes.byref(provided)
    )
    for comm in (mpi.COMM_WORLD, mpi.COMM_SELF):
        comm.Set_errhandler(mpi.ERRORS_RETURN)
