"""Detects a process that hangs: it lives, and its threads may send heartbeats, but it makes no progress.

The kernel distinguishes it from a process that computes for long or waits for a slow disk. A rank that computes uses
processor time; so does a rank that waits for others, because it polls for messages; a rank that waits for a disk or a
file server is in an uninterruptible sleep. A process that waits for a lock or a pipe without end does none of these.
"""

from __future__ import annotations

import contextlib
import os
import time

MIN_USAGE = 1e-3  # seconds of processor time in each second: polling for messages takes several times that
_TASKS = "/proc/self/task"


class Stillness:
    """Observes this process from one of its threads, whose own work does not count."""

    def __init__(self) -> None:
        self._used, self._looked = self._processor_time(), time.monotonic()

    def look(self) -> bool:
        """Return whether all other threads have done nothing since the last call, as far as the kernel shows."""
        used, now = self._processor_time(), time.monotonic()
        idle = used - self._used < MIN_USAGE * (now - self._looked)
        self._used, self._looked = used, now
        return idle and not _waits_in_kernel()

    def _processor_time(self) -> float:
        return time.process_time() - time.thread_time()


def _waits_in_kernel() -> bool:
    """Return whether a thread is in state D (see proc(5)); True where that is not visible (not Linux)."""
    try:
        threads = os.listdir(_TASKS)
    except OSError:
        return True
    for thread in threads:
        with contextlib.suppress(OSError), open(f"{_TASKS}/{thread}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "D":
                return True
    return False
