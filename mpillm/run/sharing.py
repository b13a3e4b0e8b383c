"""Divides the unanswered lines over the replicas by their measured speeds.

Every leader reports its progress to rank 0. The time of its steps, relative to the model of a step's time, predicts how
long it takes for any number of lines. If the replicas would end much earlier with other numbers of lines, some give
lines back.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

from mpillm.planning.replica_steps import ReplicaSteps
from mpillm.run.dispatch_messages import Standing

LOOK = 0.5  # seconds between two checks
STEPS, SECONDS = 3, 0.5  # the least steps and seconds from which a replica's speed is computed
KEPT = 0.5  # the weight of the earlier value in the moving average of the speed
# Lines move if all replicas end earlier by the factor GAIN (plans may be off by 15 %) and by COST seconds.
GAIN, COST = 1.15, 0.5
PRECISION = 0.01  # the relative precision of the time at which all end


class Sharing:
    """The measured speeds of the replicas, on rank 0."""

    def __init__(self, steps: Sequence[ReplicaSteps], planned: Sequence[float]) -> None:
        """`steps` has each replica's times by the model, and `planned` their shares of the lines."""
        self._steps, self.planned = steps, planned
        self._since: dict[int, Standing] = {}  # the progress at the beginning of each replica's window
        self._last: dict[int, Standing] = {}
        self._slower: dict[int, float] = {}  # measured time of steps divided by their time by the model
        self._looked = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another check."""
        return len(self._steps) > 1 and time.monotonic() > self._looked + LOOK

    def begun(self, own: Standing) -> float:
        """Return the computed part of the lines in progress, as a number of lines; `own` is rank 0's progress."""
        standing = {**self._last, 0: own}.values()
        return sum(one.lines * (1 - one.left / one.whole) for one in standing if one.whole)

    def note(self, replica: int, now: Standing) -> None:
        """Note the progress of a replica. Its first step loads the weights, and does not count."""
        self._last[replica] = now
        if now.steps == 0:
            return
        since = self._since.setdefault(replica, now)
        steps, seconds = now.steps - since.steps, now.seconds - since.seconds
        if steps >= STEPS and seconds >= SECONDS:
            slower = seconds / steps / self._steps[replica].seconds((now.rows - since.rows) / steps)
            before = self._slower.get(replica, slower)
            self._slower[replica] = math.exp(KEPT * math.log(before) + (1 - KEPT) * math.log(slower))
            self._since[replica] = now

    def targets(self, held: Sequence[int], waiting: int) -> list[int] | None:
        """Return how many lines each replica should compute in total; None if nothing should change.

        `held` is the number of lines that each replica holds, and `waiting` further lines wait on rank 0. Lines are
        given back only if all replicas end clearly earlier then.
        """
        self._looked = time.monotonic()
        unknown = [replica for replica in range(len(held)) if replica not in self._slower]
        if (
            len(self._last) < len(held)
            or any(waiting or held[replica] for replica in unknown)
            or not self._slower
        ):
            return None
        # A replica that was done before it could be measured counts as fast as the fastest.
        slower = dict.fromkeys(unknown, min(self._slower.values())) | self._slower
        last = [self._last[replica] for replica in range(len(held))]
        each = [one.left / max(one.lines, 1) for one in last]
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
        now, then = (max(map(seconds, range(len(held)), of)) for of in (held, found))
        if now > GAIN * then and now > then + COST:
            self._last.clear()  # the reports do not include the moved lines
            self._since.clear()
            return found
        return [max(*pair) for pair in zip(held, found, strict=True)] if waiting else None


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
