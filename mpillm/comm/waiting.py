"""Waiting for a message without burning the core that another rank may need to send it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SPIN = 2e-3  # seconds of asking again and again, when every thread has a core of its own
SPIN_CROWDED = 100e-6  # the same when it has not: a core given away is a core that computes
SHORTEST_PAUSE = 20e-6
LONGEST_PAUSE = 2e-3  # a waiting rank then wakes 500 times a second: about 1 % of a core
PATIENCE = 1 / 16  # a pause is at most this part of the time waited so far


def wait(done: Callable[[], object], crowded: bool, look: Callable[[], None] | None = None) -> float:
    """Call `done` until it returns something true; return the seconds that took.

    Every call of MPI moves all outstanding messages on, so waiting for one also finishes the others. Unlike a
    blocking MPI call it leaves room for Python's signal handlers and for other threads. `look` is called now and
    then, if it takes longer: it raises what makes waiting senseless.
    """
    if done():
        return 0.0
    start = time.perf_counter()
    spin = SPIN_CROWDED if crowded else SPIN
    while (waited := time.perf_counter() - start) < spin:
        if done():
            return waited
        os.sched_yield()  # next to nothing when nobody wants the core; a whole time slice saved when somebody does
    while not done():
        if look is not None:
            look()
        waited = time.perf_counter() - start
        time.sleep(min(max(SHORTEST_PAUSE, waited * PATIENCE), LONGEST_PAUSE))
    return time.perf_counter() - start
