"""The deadline: how long a silent rank is waited for, and the timers that end this process.

MPI waits for a stopped rank, a dead machine or a cut cable without limit, and its launcher notices none of them.
`heartbeat` enforces the deadline while the ranks run, `meeting` while they start, and `alarm` while they end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping

from mpillm.comm import launch
from mpillm.errors import JobError

VARIABLE = "MPILLM_DEADLINE"
LIMIT = 20.0  # seconds of silence: longer than a crowded machine stalls, and the world ends within 30
STARTING = 6  # ranks that start cannot hear each other yet; their limit is this many times as long
INTERVAL = 1.0  # seconds between two heartbeats, unless the limit is short
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def limit(environ: Mapping[str, str]) -> float:
    """Return the seconds of silence that MPILLM_DEADLINE allows; 0 means no limit (a debugger stops ranks)."""
    text = environ.get(VARIABLE, str(LIMIT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise JobError(f"{VARIABLE} = {text!r} is not a number of seconds (0: no deadline).")
    return seconds


def starting_limit(environ: Mapping[str, str]) -> float:
    """Return the seconds that ranks may take to meet (see `meeting`); 0 means no limit."""
    try:
        return STARTING * limit(environ)
    except JobError:  # reported when the ranks have met
        return STARTING * LIMIT


def interval(limit: float) -> float:
    """Return the seconds between two heartbeats."""
    return min(INTERVAL, limit / 4)


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when the launcher that started it ends, even if this process is stopped."""
    parent = os.getppid()
    if not launch.starter_folder():
        return
    with contextlib.suppress(OSError, AttributeError):  # other systems than Linux have no such call
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def alarm(seconds: float) -> None:
    """End this process by SIGALRM after `seconds` seconds; 0 cancels the alarm.

    MPI_Finalize waits for all ranks and holds Python's lock meanwhile, so no thread can watch it.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)
