"""Measure how fast a core runs plain code of this process, in about a millisecond."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

T = TypeVar("T")

TURNS, TURN = 20_000, 70e-9  # turns of a loop in Python, and seconds of a turn if `Speed.core` is 1
LOOK, LOOK_TURNS = 0.001, 2000  # seconds of a look at the pace, and turns of a call
# A timing makes at least CALLS calls, unless it takes PATIENCE times as long as it should.
CALLS, PATIENCE = 8, 4
FEWEST = 3  # calls of any timing
WHOLE = 0.85  # the part of a core that counts as a whole one
WAITED = Path("/proc/self/schedstat")  # the nanoseconds that this thread has run, and has waited for a core


def pace() -> float:
    """Return how fast a core runs this rank's plain code, as `Speed.core`, times the part of the core that it gets."""
    return core_speed(LOOK, LOOK_TURNS) * part_so_far(WAITED)


def part_so_far(waited: Path) -> float:
    """Return the part of a core that this process has got since it started (mostly while it imported modules).

    It is less than 1 if a control group has a quota, which a container may hide, or if other programs compute.
    """
    try:
        ran, waiting = map(int, waited.read_text().split()[:2])
    except (OSError, ValueError):  # not Linux, or a kernel that does not count it
        return 1.0
    part = ran / (ran + waiting) if ran else 1.0
    return part if part < WHOLE else 1.0


def core_speed(seconds: float, turns: int = TURNS) -> float:
    """Return how fast one core runs plain code, as `Speed.core`: calls of `turns` turns for about `seconds`."""
    return TURN / typical(plain_code, [turns], seconds) * turns


def typical(call: Callable[[T], object], data: Sequence[T], for_seconds: float) -> float:
    """Return the seconds of a call on a core of its own: the median of this thread's, with each of `data` in turn.

    The fastest one is that whose data happened to be in a cache, and other programs disturb the slowest ones.
    """
    call(data[0])
    seconds, first = list[float](), time.perf_counter()
    # A busy machine, or a quota, may take the core away for longer than all calls may last. The call in which that
    # happens takes up to a thousand times as long, also by the thread's own clock: so it is never the median.
    while (passed := time.perf_counter() - first) < for_seconds or len(seconds) < (
        CALLS if passed < PATIENCE * for_seconds else FEWEST
    ):
        start = time.thread_time()
        call(data[len(seconds) % len(data)])
        seconds.append(time.thread_time() - start)
    return median(seconds)


def plain_code(turns: int) -> None:
    """Replace entries of a table `turns` times."""
    table: dict[int, tuple[int, object]] = {}
    for turn in range(turns):
        table[turn & 1023] = (turn, table.get(turn >> 1))
