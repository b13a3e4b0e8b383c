"""Estimate the seconds of a replica's steps by their number of rows, with the model of `stage_time`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpillm.planning.estimate import at_once
from mpillm.planning.job_time import Demand
from mpillm.planning.placement import Placement
from mpillm.planning.stage_time import round_of
from mpillm.planning.step_time import StepRows


@dataclass(frozen=True)
class ReplicaSteps:
    """The times of a replica's steps. `rows` are increasing, and up to `maximum` sequences run at once."""

    maximum: int
    rows: Sequence[float]
    times: Sequence[float]  # seconds of a step, for each number of rows

    def seconds(self, rows: float) -> float:
        """Return the seconds of a step of `rows` rows."""
        if rows > self.rows[-1]:
            return float(self.times[-1] * rows / self.rows[-1])
        return float(np.interp(rows, self.rows, self.times))


def replica_steps(placement: Placement, demand: Demand) -> list[ReplicaSteps]:
    """Return the steps of each replica, with sequences like those of a demand."""
    found = []
    for number, (replica, plan) in enumerate(zip(placement.replicas, placement.plans, strict=True)):
        stages = placement.stages(number)
        maximum = max(int(at_once(plan, replica, demand)), 1)
        rows = [1 << power for power in range(maximum.bit_length())]
        times = [round_of(stages, StepRows(count, count, demand.context)).seconds for count in rows]
        found.append(ReplicaSteps(maximum, rows, times))
    return found
