"""Until the ranks have met: MPI_Init waits for all of them, for ever, and they cannot hear each other yet.

A thread of every rank ends it when that takes too long, and at once when one of the ranks that the launcher has started
beside it is stopped or gone: nobody else would see it. (Without ULFM the launcher ends all when one is gone.)
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
    """Watches over the start of the ranks until `over` is called."""

    def __init__(self, limit: float, beat: float, kill: bool) -> None:
        """`limit` is how many seconds the ranks may take; `kill` a stopped one, for the launcher will not."""
        self._limit, self._beat, self._kill = limit, beat, kill
        self._beside = _Beside()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meeting", daemon=True)
        self._thread.start()

    def over(self) -> None:
        """The ranks have met, or will not."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        left = self._limit  # counted in own beats: who was stopped itself accuses nobody
        while not self._over.wait(self._beat):
            left -= self._beat
            if self._beside.look() or left <= 0:
                self._end()

    def _end(self) -> None:
        beside = self._beside
        if beside.speaks:
            what = f"The ranks have not met within {self._limit:g} s: one does not start, its machine is gone, or "
            what += "the network is cut"
            if beside.incomplete:
                what = f"The ranks had not met when one on {socket.gethostname()} was stopped or ended"
            sys.stderr.write(f"mpillm: {what}; the same command goes on from here.\n")
            sys.stderr.flush()
        # A rank that ends may have the launcher end all: let the one speak first. It stays as well, or one that looks
        # late would take it for lost, and speak too.
        time.sleep(2 * self._beat)
        for process in beside.lost if self._kill else ():
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(Interrupted.exit_code)


class _Beside:
    """The other ranks that this rank's launcher has started on this machine, as far as the kernel shows them."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._words = self._own.cmdline()
        self._launcher = self._own.parent() if launch.starter_folder() else None
        self._size = launch.ranks_on_this_machine(os.environ)
        self._stopped: dict[psutil.Process, int] = {}  # looks in which it was, one after the other
        self._too_few = 0  # looks in which there were not as many as have been started, one after the other
        self.lost: list[psutil.Process] = []
        self.look()

    def look(self) -> bool:
        """Once a beat: whether one of them is stopped, or gone."""
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
        # One may have been gone before it was seen; what else the launcher started counts for it, if that is so.
        self._too_few = self._too_few + 1 if len(alive) < self._size else 0
        for child in alive:
            with contextlib.suppress(psutil.Error):
                if child != self._own and child not in self._stopped and child.cmdline() == self._words:
                    self._stopped[child] = 0

    @property
    def incomplete(self) -> bool:
        """Whether not all of them will come."""
        return bool(self.lost) or self._too_few >= STOPPED

    @property
    def speaks(self) -> bool:
        """Whether it is for this rank to say something: one of a machine is enough."""
        return all(self._own.pid < rank.pid for rank in self._stopped if rank not in self.lost)


def _status(process: psutil.Process) -> str:
    """Its status; one that has ended is dead."""
    status: str = psutil.STATUS_DEAD
    with contextlib.suppress(psutil.Error):
        status = process.status()
    return psutil.STATUS_DEAD if status == psutil.STATUS_ZOMBIE else status


def initialise(mpi: ModuleType, library: str) -> None:
    """MPI_Init_thread, and the errors become exceptions; `library` is the file that is loaded.

    Not by mpi4py, which keeps Python's lock while the ranks wait for each other: threads shall go on.
    """
    if not library:  # not Linux, most likely
        mpi.Init_thread(mpi.THREAD_FUNNELED)
        return
    provided = ctypes.c_int()
    # Only the main thread talks; the others read and compute.
    ctypes.CDLL(library).MPI_Init_thread(
        None, None, ctypes.c_int(mpi.THREAD_FUNNELED), ctypes.byref(provided)
    )
    for comm in (mpi.COMM_WORLD, mpi.COMM_SELF):
        comm.Set_errhandler(mpi.ERRORS_RETURN)
