"""How long steps of a replica take by the model of a step's time, by their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpillm.model.config import ModelConfig
from mpillm.partition.replicas import Replica
from mpillm.planning.estimate import at_once, stages_of
from mpillm.planning.job_time import Demand
from mpillm.planning.machines import Machines
from mpillm.planning.rank_plan import ReplicaPlan
from mpillm.planning.step_time import StepRows, round_of
from mpillm.spec import Spec


@dataclass(frozen=True)
class ReplicaSteps:
    """The times of a replica's steps; `rows` are increasing, and up to `maximum` sequences run at once."""

    maximum: int
    rows: Sequence[float]
    times: Sequence[float]  # seconds of a step of so many rows

    def seconds(self, rows: float) -> float:
        """Return the seconds of a step of so many rows."""
        if rows > self.rows[-1]:
            return float(self.times[-1] * rows / self.rows[-1])
        return float(np.interp(rows, self.rows, self.times))


def replica_steps(
    spec: Spec,
    config: ModelConfig,
    machines: Machines,
    replicas: Sequence[Replica],
    plans: Sequence[ReplicaPlan],
    demand: Demand,
) -> list[ReplicaSteps]:
    """The steps of each replica for sequences as those of a demand."""
    found = []
    for replica, plan in zip(replicas, plans, strict=True):
        stages = stages_of(spec, config, machines, replica, plan)
        maximum = max(int(at_once(plan, replica, demand)), 1)
        rows = [1 << power for power in range(maximum.bit_length())]
        times = [round_of(stages, StepRows(count, count, demand.context)).seconds for count in rows]
        found.append(ReplicaSteps(maximum, rows, times))
    return found
