"""The end of MPI: when the process ends, because MPI cannot be started again in a process that has ended it.

Only a process that has started MPI ends it (`program.start`); one that was given it leaves that to its owner.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from dataclasses import dataclass

from mpillm.comm import deadline

GRACE = 2.0  # seconds in which MPI must end after an error


@dataclass
class _Last:
    """The state in which the last world of this process has ended."""

    limit: float = 0.0  # seconds that the others may take to end, 0 if there is no limit


_last = _Last()
_begun = threading.Event()


def ours() -> None:
    """Let this process, which has started MPI, end it at exit."""
    atexit.register(_finalize)


def world_ended(code: int, orderly: bool, limit: float) -> None:
    """Note that a world of several ranks has ended with this exit code; `orderly`: no message is under way.

    MPI may wait for ever for messages that nobody will take.
    """
    _last.limit = limit
    if not orderly:
        threading.Thread(target=_end_after_grace, args=(code,), name="ending", daemon=True).start()


def _end_after_grace(code: int) -> None:
    _begun.wait()
    time.sleep(GRACE)
    os._exit(code)


def _finalize() -> None:
    from mpi4py import MPI

    if MPI.Is_finalized():
        return
    _begun.set()
    if _last.limit:
        deadline.alarm(_last.limit)
    MPI.Finalize()
    deadline.alarm(0)
