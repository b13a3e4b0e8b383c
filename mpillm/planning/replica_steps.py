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
    """The times of a replica's steps. `rows` are increasing, and up to `maximum` sequences run at once.

    Steps of more rows compute prompts.
    """

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
        batches = [
            StepRows(count, count, demand.context)
            for count in (1 << power for power in range(maximum.bit_length()))
        ]
        if (most := plan.step.tokens) > maximum:
            length = max(demand.prompt / demand.requests, 1.0)
            batches.append(StepRows(most, most / length, length / 2))
        times = [round_of(stages, batch).seconds for batch in batches]
        found.append(ReplicaSteps(maximum, [batch.rows for batch in batches], times))
    return found
