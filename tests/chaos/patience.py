"""How long a start has been silent, without the time for which a busy machine had no core for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path


class Patience:
    """A clock that stands still while the process that waits longest for a core does so.

    On a crowded machine a start may honestly take a minute. A process that hangs does not want a core.
    """

    def __init__(self, since: float) -> None:
        """`since` is a time of `time.monotonic`."""
        self.since = since
        self._queued: dict[int, float] = {}  # by process, when it was seen first

    def renew(self) -> None:
        """There was a sign of life."""
        self.since = time.monotonic()
        self._queued.clear()

    def spent(self, processes: Iterable[int]) -> float:
        """Seconds without a sign of life in which these processes, by their numbers, could have gone on."""
        kept = 0.0
        for process in processes:
            now = queued(process)
            kept = max(kept, now - self._queued.setdefault(process, now))
        return max(0.0, time.monotonic() - self.since - kept)


def queued(process: int) -> float:
    """Seconds that a process has waited for a core, as schedstat of proc(5) has it; 0 where it is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    return 0.0
