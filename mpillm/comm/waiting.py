"""Waiting for a message without burning the core that another rank may need to send it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SPIN = 2e-3  # seconds of polling without pauses, where every thread has a core of its own
SPIN_CROWDED = 100e-6  # the same if it has not, or if a quota counts the polling
POLL = 50e-6  # seconds of polling shared memory before MPI gets a turn
MIN_PAUSE = 20e-6
MAX_PAUSE = 2e-3  # a waiting rank then wakes 500 times a second: about 1 % of a core
PAUSE_RATIO = 1 / 16  # a pause is at most this part of the time waited so far


def wait(done: Callable[[], object], crowded: bool, look: Callable[[], None] | None = None) -> float:
    """Call `done` until it returns something true; return the seconds that took.

    Every call of MPI progresses all outstanding messages, so waiting for one also finishes the others. Unlike a
    blocking MPI call, this lets Python's signal handlers and other threads run. `look` is called between polls if it
    takes longer; it raises an exception if waiting has become pointless.
    """
    if done():
        return 0.0
    start = time.perf_counter()
    spin = SPIN_CROWDED if crowded else SPIN
    while (waited := time.perf_counter() - start) < spin:
        if done():
            return waited
        os.sched_yield()  # nearly free if nobody wants the core; saves a time slice if somebody does
    while not done():
        if look is not None:
            look()
        waited = time.perf_counter() - start
        time.sleep(pause_after(waited))
    return time.perf_counter() - start


def wait_for_flags(arrived: Callable[[float, float], bool], crowded: bool, look: Callable[[], None]) -> float:
    """Wait for what other processes write to shared memory; return the seconds that took.

    `arrived` takes the maximum seconds to poll and then to sleep, and returns whether all is there. Between its
    calls `look` is called; it raises an exception if waiting has become pointless.
    """
    if arrived(0.0, 0.0):
        return 0.0
    start, waited = time.perf_counter(), 0.0
    spin = 0.0 if crowded else SPIN
    while not arrived(POLL if waited < spin else 0.0, 0.0 if waited < spin else pause_after(waited)):
        look()
        waited = time.perf_counter() - start
    return time.perf_counter() - start


def pause_after(waited: float) -> float:
    """Return the seconds of the next pause after `waited` seconds."""
    return min(max(MIN_PAUSE, waited * PAUSE_RATIO), MAX_PAUSE)
