"""Plan a layout on machines: what its ranks hold, the wire of its shards, and the time of the job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpillm.comm.transfer import Wire
from mpillm.model.config import ModelConfig
from mpillm.partition.replicas import Replicas
from mpillm.planning.estimate import (
    DEAR,
    Estimate,
    demand_of,
    estimate,
    faster_wire,
    replica_shares,
    stage_layers_by_speed,
)
from mpillm.planning.input_needs import InputNeeds
from mpillm.planning.job_time import IMPORTS, READY
from mpillm.planning.machines import Machines
from mpillm.planning.placement import Placement
from mpillm.planning.planner import Planner
from mpillm.planning.rank_plan import ReplicaPlan
from mpillm.planning.speed import ASSUMED
from mpillm.planning.wire import shards_cross_hosts
from mpillm.spec import Spec, shown_bytes


@dataclass(frozen=True)
class Chosen:
    """A layout, with the reasons for its number of replicas and for its wire, in a few words.

    `compared` says how much longer the second best layout would take, if others were tried. If `shares_by_speed` is
    empty, replicas compute equal parts of the requests.
    """

    replicas: Replicas
    reason: str
    wire: Wire = "f32"  # between the shards of a stage
    wire_reason: str = ""
    inexact: bool = False  # the wire is Q8_0 though the job does not ask for it
    compared: str = ""
    shares_by_speed: tuple[float, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of the requests that each replica is to compute."""
        return self.shares_by_speed or (1 / len(self.replicas),) * len(self.replicas)


@dataclass(frozen=True)
class Found:
    """A layout on machines, what its ranks hold, and the estimated time of the job."""

    machines: Machines
    chosen: Chosen
    plans: Sequence[ReplicaPlan]
    time: Estimate

    @property
    def cost(self) -> float:
        """The seconds by which layouts are compared: of the job and of the start, times DEAR if the layout is inexact.

        Rank 0 starts as soon as it can. The ranks that compute wait for the one with the slowest core.
        """
        cores = [speed.core for speed in self.machines.speeds] or [ASSUMED.core]
        ready = (IMPORTS + READY) / min(cores) - IMPORTS / cores[0]
        return (self.time.seconds + ready) * (DEAR if self.chosen.inexact else 1.0)

    @property
    def fits(self) -> bool:
        """Whether the free memory of every rank is enough."""
        return all(rank.held <= self.machines.free[rank.rank] for plan in self.plans for rank in plan.ranks)


class LayoutPlanner:
    """Plans layouts of a job on `machines`. Equal replicas are planned once, and their plans are kept in `known`."""

    def __init__(
        self,
        spec: Spec,
        planner: Planner,
        asked: InputNeeds,
        machines: Machines,
        known: dict[tuple[Any, ...], ReplicaPlan],
    ) -> None:
        self.spec, self.machines = spec, machines
        self._planner, self._asked = planner, asked
        self._known = known
        self._layers: dict[
            tuple[object, ...], tuple[int, ...] | None
        ] = {}  # the layers of stages, by their speeds

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model."""
        return self._planner.config

    def plans(self, chosen: Chosen) -> Iterator[ReplicaPlan]:
        """Return the plan of each replica: what its ranks will hold."""
        return self._planner.replicas(
            self.spec, chosen.replicas, self._asked, self.machines, chosen.shares, self._known
        )

    def _placement(self, chosen: Chosen) -> Placement:
        """Return a layout with the plans of its replicas."""
        plans, replicas = list(self.plans(chosen)), chosen.replicas
        return Placement(self.spec, self.config, self.machines, replicas, plans).with_wire(chosen.wire)

    def too_much(self, plans: Iterable[ReplicaPlan]) -> str | None:
        """Why replicas cannot hold the whole model and a request of the longest context in memory; None if they can."""
        for plan in plans:
            if 0 < plan.cached_tokens < plan.max_context:
                return f"the KV cache of each would hold {plan.cached_tokens} tokens (memory.kv, memory.max_context)"
            for rank in plan.ranks:
                if rank.weights_streamed:
                    return "some rank would read weights from disk in each step (memory.weights)"
                if rank.held > self.machines.free[rank.rank]:
                    free = shown_bytes(self.machines.free[rank.rank])
                    return f"rank {rank.rank} would hold {shown_bytes(rank.held)}, and {free} are free"
        return None

    def found(self, chosen: Chosen) -> Found:
        """Complete a layout with its wire, its layers by speed and its shares, and estimate its time."""
        if not chosen.wire_reason:
            chosen = self._with_wire(chosen)
        chosen, demand = self.with_layers_by_speed(chosen), demand_of(self._asked)
        placement = self._placement(chosen)
        shares = tuple(replica_shares(placement, demand))
        if shares != chosen.shares:
            chosen = replace(chosen, shares_by_speed=shares)
            placement = self._placement(chosen)
        return Found(self.machines, chosen, placement.plans, estimate(placement, demand))

    def with_layers_by_speed(self, chosen: Chosen) -> Chosen:
        """Give faster stages more layers, within their memory, if the speeds of ranks are known."""
        if not self.machines.speeds or all(replica.stages == 1 for replica in chosen.replicas):
            return chosen
        placement, found, uneven = self._placement(chosen), list(chosen.replicas), list[str]()
        for number, replica in enumerate(chosen.replicas):
            if replica.stages > 1:
                free = self.machines.free[replica.first : replica.ranks.stop]
                key = chosen.wire, *placement.kind(number), id(placement.plans[number].works), *free
                if key not in self._layers:
                    self._layers[key] = stage_layers_by_speed(placement, number, self._asked)
                if (layers := self._layers[key]) is not None:
                    found[number] = replace(replica, layers=layers)
                    uneven.append("-".join(map(str, layers)))
        if not uneven:
            return chosen
        reason = f"{chosen.reason}; layers by speed and memory: {', '.join(dict.fromkeys(uneven))}"
        return replace(chosen, replicas=tuple(found), reason=reason)

    def _with_wire(self, chosen: Chosen) -> Chosen:
        """Choose the wire between shards, if the job leaves it open."""
        given = self.spec.wire.activations
        if given != "auto":
            return replace(chosen, wire=given, wire_reason="wire.activations says so")
        if not shards_cross_hosts(self.machines, chosen.replicas):
            return replace(chosen, wire="f32", wire_reason="those of a stage share a host")
        if not self.machines.links_known:
            return replace(chosen, wire="f32", wire_reason="the job is too short to measure the network")
        wire, reason = faster_wire(self._placement(chosen), demand_of(self._asked))
        return replace(chosen, wire=wire, wire_reason=reason, inexact=wire != "f32")
