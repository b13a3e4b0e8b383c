"""Detect a process that hangs: it lives, and its threads may send heartbeats, but it makes no progress.

The kernel distinguishes it from a process that computes for long, waits for a slow disk, or gets no core on a crowded
machine. A rank that computes uses processor time; so does a rank that waits for others, because it polls for messages;
a rank that waits for a disk or a file server is in an uninterruptible sleep; one that could run waits in the queue for
a core. A process that waits for a lock or a pipe without end does none of these.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

MIN_USAGE = 1e-3  # seconds of processor time in each second: polling for messages takes several times that
_TASKS = "/proc/self/task"


class Stillness:
    """Observes this process from one of its threads, whose own work does not count."""

    def __init__(self) -> None:
        self._used, self._looked = self._wanted_time(), time.monotonic()

    def look(self) -> bool:
        """Return whether all other threads have done nothing since the last call, as far as the kernel shows."""
        used, now = self._wanted_time(), time.monotonic()
        idle = used - self._used < MIN_USAGE * (now - self._looked)
        self._used, self._looked = used, now
        return idle and not _waits_in_kernel()

    def _wanted_time(self) -> float:
        """Return the seconds for which the other threads have computed, or have waited for a core."""
        return time.process_time() - time.thread_time() + sum(_queued(thread) for thread in _others())


def _others() -> Iterator[str]:
    """Return the numbers of the other threads; none where they are not visible (not Linux)."""
    with contextlib.suppress(OSError):
        yield from (thread for thread in os.listdir(_TASKS) if thread != str(threading.get_native_id()))


def _queued(thread: str) -> float:
    """Return the seconds that a thread has waited for a core (see schedstat in proc(5)); 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"{_TASKS}/{thread}/schedstat") as file:
        return int(file.read().split()[1]) / 1e9
    return 0.0


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
