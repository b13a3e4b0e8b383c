"""Is this process doing anything? One that hangs lives, and its threads may speak, but it gets nowhere.

What tells it from one that computes long or waits for a slow disk is in the kernel: who computes uses processor time,
and so does who waits for other ranks, for it asks for messages again and again; who waits for a disk or a file server
is in an uninterruptible sleep. A lock that nobody gives back, or a pipe into which nobody writes, is none of these.
"""

from __future__ import annotations

import contextlib
import os
import time

LEAST = 1e-3  # of a second of processor time in each second: waiting for messages takes several times that
_TASKS = "/proc/self/task"


class Stillness:
    """Looks at this process from a thread of it, whose own work does not count."""

    def __init__(self) -> None:
        self._used, self._looked = self._processor_time(), time.monotonic()

    def look(self) -> bool:
        """Whether all other threads have done nothing since the last look, as far as that can be seen."""
        used, now = self._processor_time(), time.monotonic()
        idle = used - self._used < LEAST * (now - self._looked)
        self._used, self._looked = used, now
        return idle and not _waits_in_kernel()

    def _processor_time(self) -> float:
        return time.process_time() - time.thread_time()


def _waits_in_kernel() -> bool:
    """Whether a thread is in state D (see proc(5)), or it cannot be seen (not Linux)."""
    try:
        threads = os.listdir(_TASKS)
    except OSError:
        return True
    for thread in threads:
        with contextlib.suppress(OSError), open(f"{_TASKS}/{thread}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "D":
                return True
    return False
