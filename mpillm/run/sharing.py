"""How replicas share the lines that are not answered yet, by how fast each has turned out to be.

Every leader tells rank 0 how far it is. What its steps took, beside the model of a step's time, says how long any
number of lines will take it. If the replicas would end much earlier with other numbers of lines, some give lines back.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence

from mpillm.planning.replica_steps import ReplicaSteps
from mpillm.run.dispatch_messages import Standing

LOOK = 0.5  # seconds between two looks
STEPS, SECONDS = 3, 0.5  # that a replica computes at least before its speed is known
KEPT = 0.5  # the weight of what was known before
GAIN, COST = 1.15, 0.5  # how many times as early all must end (plans may be off by 15 %), and seconds
PRECISION = 0.01  # of the time in which all end


class Sharing:
    """What rank 0 knows of the replicas, by their numbers."""

    def __init__(self, steps: Sequence[ReplicaSteps], planned: Sequence[float]) -> None:
        """`steps` are their times by the model, and `planned` the shares of the lines by it."""
        self._steps, self.planned = steps, planned
        self._since: dict[int, Standing] = {}  # the beginning of each one's window
        self._last: dict[int, Standing] = {}
        self._slower: dict[int, float] = {}  # how many times as long as by the model its steps take
        self._looked = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another look."""
        return len(self._steps) > 1 and time.monotonic() > self._looked + LOOK

    def begun(self, own: Standing) -> float:
        """How many lines' worth is computed of those that replicas hold; rank 0's own is so far."""
        standing = {**self._last, 0: own}.values()
        return sum(one.lines * (1 - one.left / one.whole) for one in standing if one.whole)

    def note(self, replica: int, now: Standing) -> None:
        """A replica is so far. Its first step loads the weights, and does not count."""
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
        """How many lines each replica should hold, with those that it is still to get; None if that is as it should be.

        `held` is how many each has, and so many are `waiting` besides. Nobody has to give lines back unless all end
        clearly earlier then.
        """
        self._looked = time.monotonic()
        unknown = [replica for replica in range(len(held)) if replica not in self._slower]
        if (
            len(self._last) < len(held)
            or any(waiting or held[replica] for replica in unknown)
            or not self._slower
        ):
            return None
        # Who is done before it could be measured is as fast as any.
        slower = dict.fromkeys(unknown, min(self._slower.values())) | self._slower
        last = [self._last[replica] for replica in range(len(held))]
        each = [one.left / max(one.lines, 1) for one in last]
        # Whoever gets a line computes its prompt, and what was generated, once more.
        new, deepest = max(one.whole / max(one.lines, 1) for one in last), max(each)

        def seconds(replica: int, lines: int) -> float:
            """What a replica needs for so many lines; those that it does not hold yet are as long as any."""
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
            self._last.clear()  # what is moved is not yet in it
            self._since.clear()
            return found
        return [max(*pair) for pair in zip(held, found, strict=True)] if waiting else None


def _divided(seconds: Callable[[int, int], float], held: Sequence[int], waiting: int) -> list[int]:
    """How many of all lines each replica should have so that all end as early as possible, with few that move.

    A replica needs `seconds(replica, lines)`, the longer the more lines it has.
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
