"""The replicas of a job on their machines, with the plan of each rank. Times are estimated from it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from mpillm.comm.transfer import Wire
from mpillm.kernels import BlockType
from mpillm.model.config import ModelConfig
from mpillm.partition.replicas import Replica
from mpillm.planning.machines import Machines
from mpillm.planning.rank_plan import ReplicaPlan
from mpillm.planning.stage_time import Stage, sum_bytes
from mpillm.planning.wire import with_wire
from mpillm.spec import Spec


@dataclass(frozen=True)
class Placement:
    """Replicas on machines, and the plan of each. `spec.wire.activations` is never "auto"."""

    spec: Spec
    config: ModelConfig
    machines: Machines
    replicas: Sequence[Replica]
    plans: Sequence[ReplicaPlan]

    def with_wire(self, wire: Wire) -> Placement:
        """Return the same placement with another wire between the shards of a stage."""
        return replace(self, spec=with_wire(self.spec, wire))

    def while_others_idle(self, busy: Collection[int]) -> Placement:
        """Return the same placement while only the replicas `busy` compute."""
        idle = {
            rank for number, other in enumerate(self.replicas) if number not in busy for rank in other.ranks
        }
        return replace(self, machines=self.machines.while_idle(idle))

    def kind(self, number: int) -> tuple[object, ...]:
        """Return a key that is equal for replicas that are equally fast."""
        machines, replica, hosts = self.machines, self.replicas[number], self.machines.host_of_rank
        ranks = replica.ranks
        speeds = [
            id(machines.speeds[rank]) if machines.speeds else hosts.count(hosts[rank]) for rank in ranks
        ]
        places = [hosts[rank] - hosts[replica.first] for rank in ranks]
        works = map(id, self.plans[number].works)
        loads = [machines.loads[rank] for rank in ranks] if machines.crowded(ranks) else []
        return (*speeds, *places, replica.stages, replica.shards, replica.layers, *works, *loads)

    def stages(self, number: int) -> list[Stage]:
        """Return the stages of a replica with their links; equal stages are one object."""
        replica, plan, wire = self.replicas[number], self.plans[number], self.spec.wire
        activations = sum_bytes(BlockType[wire.activations.upper()], self.config.hidden, replica.shards)
        pipe = BlockType[wire.between_stages.upper()].row_bytes(self.config.hidden)
        groups = replica.stage_ranks

        alike, found = dict[tuple[object, ...], Stage](), []
        for at, group in enumerate(groups):
            works = [plan.works[rank - replica.first] for rank in group]
            speeds = [self.machines.speed_of(rank) for rank in group]
            own, next_one = self.machines.link(group), None
            if at + 1 < len(groups):
                next_one = self.machines.link([*group, *groups[at + 1]])
            crowded, alone = self.machines.crowded(group), self._alone(number, group)
            key = (*map(id, works), *map(id, speeds), own, next_one, crowded, alone)
            if key not in alike:
                alike[key] = Stage(works, speeds, activations, own, pipe, next_one, crowded, alone)
            found.append(alike[key])
        return found

    def _alone(self, number: int, group: Sequence[int]) -> float:
        """Return `Stage.alone` of a stage's ranks: of each other replica, one stage works at a time."""
        if not self.machines.crowded(group):
            return 1.0
        others = [
            (rank, 1 / replica.stages)
            for other, replica in enumerate(self.replicas)
            for rank in replica.ranks
            if other != number
        ]
        return self.machines.alone(group, others)
