"""Divides the unanswered lines over the replicas by their measured speeds.

Every leader reports its progress to rank 0. The time of its steps, relative to the model of a step's time, predicts how
long it takes for any number of lines. The first lines are divided by the plan, and others wait on rank 0 until that is
known. If the replicas would end much earlier with other numbers of lines, some give lines back.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from statistics import mean

from mpillm.planning.replica_steps import ReplicaSteps
from mpillm.run.dispatch_messages import Standing

LOOK = 0.5  # seconds between two checks
SECONDS = 0.5  # the least seconds of whole steps from which a replica's speed is computed
# The parts of their shares that replicas get before the speeds of all are measured, and after the first measurements;
# or enough lines for steps in which a row takes at most ENOUGH times as long as in the largest ones. What a replica has
# begun costs time to move.
FIRST, ENOUGH = (0.5, 0.75, 0.875), 1.05
KEPT = 0.5  # the weight of the earlier value in the moving average of the speed
# Lines move if all replicas end earlier by the factor GAIN (plans may be off by 15 %) and by COST seconds.
GAIN, COST = 1.15, 0.5
PLANNED = 1.05  # planned shares stay if all end as early with them but for this factor, as exact as measurements are
PRECISION = 0.003  # the relative precision of the time at which all end


class Sharing:
    """The measured speeds of the replicas, on rank 0."""

    def __init__(self, steps: Sequence[ReplicaSteps], planned: Sequence[float]) -> None:
        """`steps` has each replica's times by the model, and `planned` their shares of the lines."""
        self._steps, self.planned = steps, planned
        self._enough = [_enough(each) for each in steps]
        self._since: dict[int, Standing] = {}  # the progress at the beginning of each replica's window
        self._last: dict[int, Standing] = {}
        # For each replica the time here less that on its host: at least and at most, by the arrivals of its reports.
        self._ahead: dict[int, tuple[float, float]] = {}
        # Measured time of steps divided by their time by the model; and that of first steps, which load the weights.
        self._slower: dict[int, float] = {}
        self._first_steps: dict[int, float] = {}
        self._windows = [0] * len(steps)  # the measurements of each replica
        self._measured = 0  # the least number of measurements of a replica that has lines
        self._looked = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another check."""
        return len(self._steps) > 1 and time.monotonic() > self._looked + LOOK

    def at_first(self, replica: int, share: int) -> int:
        """Return how many lines a replica may hold whose share is `share`: fewer until all speeds are measured."""
        if self._measured >= len(FIRST) or not self._steps:
            return share
        return min(share, max(math.ceil(FIRST[self._measured] * share), self._enough[replica]))

    def begun(self, own: Standing) -> float:
        """Return the computed part of the lines in progress, as a number of lines; `own` is rank 0's progress."""
        standing = {**self._last, 0: own}.values()
        return sum(one.lines * (1 - one.left / one.whole) for one in standing if one.whole)

    def note(self, replica: int, now: Standing, not_yet: float) -> None:
        """Note the progress of a replica, whose report was not here yet at the moment `not_yet`."""
        self._last[replica] = now
        least, most = self._ahead.get(replica, (-math.inf, math.inf))
        self._ahead[replica] = max(not_yet - now.at, least), min(time.monotonic() - now.at, most)
        if now.steps == 0:
            return
        since = self._since.setdefault(replica, now)
        steps, seconds = now.steps - since.steps, now.seconds - since.seconds
        self._first_steps.setdefault(replica, self._times(replica, now.steps, now.rows, now.seconds))
        if steps and seconds >= SECONDS:
            slower = self._times(replica, steps, now.rows - since.rows, seconds)
            before = self._slower.get(replica, slower)
            self._slower[replica] = math.exp(KEPT * math.log(before) + (1 - KEPT) * math.log(slower))
            self._since[replica] = now
            self._windows[replica] += 1

    def targets(self, held: Sequence[int], waiting: int) -> list[int] | None:
        """Return how many lines each replica should compute in total; None if nothing should change.

        `held` is the number of lines that each replica holds, and `waiting` further lines wait on rank 0. Lines are
        given back only if all replicas end clearly earlier then.
        """
        self._looked, replicas = time.monotonic(), range(len(held))
        slower = self._first_steps | self._slower
        unknown = [replica for replica in replicas if replica not in slower]
        if len(self._last) < len(held) or any(waiting or held[replica] for replica in unknown) or not slower:
            return None
        measured = min((self._windows[replica] for replica in replicas if held[replica]), default=len(FIRST))
        self._measured = max(self._measured, measured)
        # A replica that was done before it could be measured counts as fast as the fastest.
        slower = dict.fromkeys(unknown, min(slower.values())) | slower
        last = [self._last[replica] for replica in replicas]
        each = [self._left(replica, slower[replica]) / max(last[replica].lines, 1) for replica in replicas]
        # The new holder of a line computes its prompt and its generated tokens again.
        new, deepest = max(one.whole / max(one.lines, 1) for one in last), max(each)

        def seconds(replica: int, lines: int) -> float:
            """Return the seconds that a replica needs for `lines` lines; new ones have the largest mean length."""
            if not lines:
                return 0.0
            if not self._last[replica].steps:
                return math.inf
            steps, more = self._steps[replica], max(lines - held[replica], 0)
            at_once = min(lines, steps.maximum)
            rows = (lines - more) * each[replica] + more * new
            rounds = max(rows / at_once, deepest if more else each[replica])
            return rounds * steps.seconds(at_once) * slower[replica]

        found = _divided(seconds, held, waiting)
        now, then = (max(map(seconds, replicas, of)) for of in (held, found))
        if measured and now > GAIN * then and now > then + COST:
            self._last.clear()  # the reports do not include the moved lines
            self._since.clear()
            return found
        if not waiting:
            return None
        # None gives lines back, and all others are handed out: by the plan, unless that is clearly wrong.
        total = sum(held) + waiting
        planned = [max(math.ceil(share * total), own) for share, own in zip(self.planned, held, strict=True)]
        as_planned = max(map(seconds, replicas, planned)) <= PLANNED * then
        return planned if as_planned else [max(*pair) for pair in zip(held, found, strict=True)]

    def _times(self, replica: int, steps: int, rows: int, seconds: float) -> float:
        """Return the time of steps divided by their time by the model."""
        return seconds / steps / self._steps[replica].seconds(rows / steps)

    def _left(self, replica: int, slower: float) -> float:
        """Return the rows of a replica's lines that are left by now; it has computed since its last report."""
        last, steps = self._last[replica], self._steps[replica]
        if not last.lines or not last.steps:
            return last.left
        at_once, passed = min(last.lines, steps.maximum), self._looked - mean(self._ahead[replica]) - last.at
        return max(last.left - passed / (steps.seconds(at_once) * slower) * at_once, 0.0)


def _enough(steps: ReplicaSteps) -> int:
    """Return the fewest lines with which a replica's steps are about as efficient as with the most lines."""
    most = steps.maximum
    fewer = (
        int(rows) for rows in steps.rows if rows * ENOUGH * steps.seconds(most) >= most * steps.seconds(rows)
    )
    return next(fewer, most)


def _divided(seconds: Callable[[int, int], float], held: Sequence[int], waiting: int) -> list[int]:
    """Return the number of lines of each replica with which all end as early as possible, moving few lines.

    `seconds(replica, lines)` is the time that a replica needs, which increases with the lines.
    """
    replicas, lines = range(len(held)), sum(held) + waiting

    def within(limit: float) -> list[int]:
        return [
            bisect_right(range(lines + 1), limit, key=lambda count: seconds(replica, count)) - 1
            for replica in replicas
        ]

    low, high = 0.0, min(seconds(replica, lines) for replica in replicas)
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if sum(within(middle)) >= lines else (middle, high)
    found = within(high)
    for _ in range(sum(found) - lines):
        most = max(
            (replica for replica in replicas if found[replica]), key=lambda one: found[one] - held[one]
        )
        found[most] -= 1
    return found
