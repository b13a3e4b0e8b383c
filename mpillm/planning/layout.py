"""Which replicas, stages and shards a job gets where it leaves that open: those that take it the least time.

What comes first is a rule: as many replicas as hosts can hold the model. Replicas work on different requests and hardly
talk, so they are faster than the same hosts as one pipeline: each of N stages waits for N - 1 messages a token, and
computes with only a share of the sequences at a time. Within a host a second replica gains nothing, because its weights
are read from the same memory. Where the speeds of several hosts are known, other numbers of replicas and shards are
tried as well by the model of a step's time, and one that is clearly faster is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mpillm.comm.collectives import Wire
from mpillm.errors import LayoutError
from mpillm.partition import replicas
from mpillm.partition.grid import Auto
from mpillm.partition.replicas import Replica, Replicas
from mpillm.planning.estimate import Estimate, demand_of, estimate, stage_layers_by_speed
from mpillm.planning.input_memory import InputNeeds
from mpillm.planning.machines import Machines
from mpillm.planning.rank_plan import Planner, ReplicaPlan
from mpillm.planning.wire import decided, shards_cross_hosts, with_wire
from mpillm.spec import Spec, shown_bytes

CLEARLY = 1.05  # how many times as fast a layout must be to be taken instead of the rule's
EXACT = "so that answers do not depend on the layout"
ALL_COUNTS = 8  # up to so many hosts every number of replicas is tried, and beyond that every halving


@dataclass(frozen=True)
class Chosen:
    """A layout, and in a few words why there are as many replicas, and why shards send what they sum like this.

    `compared` says how much longer the next best layout would take, if others were tried.
    """

    replicas: Replicas
    reason: str
    wire: Wire = "f32"  # between the shards of a stage
    wire_reason: str = ""
    compared: str = ""


@dataclass(frozen=True)
class Found:
    """A layout on machines, what its ranks hold, and what the job takes on it."""

    machines: Machines
    chosen: Chosen
    plans: list[ReplicaPlan]
    time: Estimate

    @property
    def fits(self) -> bool:
        """Whether every rank finds the memory that it needs."""
        return all(rank.held <= self.machines.free[rank.rank] for plan in self.plans for rank in plan.ranks)


@dataclass(frozen=True)
class Layouts:
    """The layouts of a job on any machines.

    `count` is the number of replicas, and `requests` that of the input, None if it is not known; `asked` is what they
    ask for. So many shards as `shards` are taken where the job leaves it open and they work.
    """

    spec: Spec
    planner: Planner
    count: int | Auto
    requests: int | None = None
    shards: int | None = None
    asked: InputNeeds = InputNeeds()  # noqa: RUF009

    def choose(self, machines: Machines) -> Found:
        """The fastest layout on all ranks of these machines; LayoutError if there is none."""
        known: dict[tuple[Any, ...], ReplicaPlan] = {}
        rule = self._by_rule(machines, known)
        if not self._open(machines):
            return rule
        best, others = rule, list[Found]()
        for replicas_of in self._others(machines, rule, known):
            # Exact, so that no answer depends on the speeds that were measured.
            exact = self.spec.wire.activations == "auto" and rule.chosen.wire == "f32"
            chosen = Chosen(replicas_of, "by the model of a step's time", *(("f32", EXACT) if exact else ()))
            found = self._found(machines, chosen, known)
            if found.fits and not self._too_short(found):
                others.append(found)
        for found in others:
            if (found.fits, -found.time.seconds) > (best.fits, -best.time.seconds):
                best = found
        if rule.fits == best.fits and rule.time.seconds <= CLEARLY * best.time.seconds:
            best = rule
        return replace(best, chosen=replace(best.chosen, compared=_compared(best, [rule, *others])))

    def _open(self, machines: Machines) -> bool:
        """Whether other layouts than the rule's are worth a look."""
        return (
            len(machines.ranks_per_host) > 1
            and bool(machines.speeds)
            and self.spec.wire.between_stages == "f32"
        )

    def _by_rule(self, machines: Machines, known: dict[tuple[Any, ...], ReplicaPlan]) -> Found:
        chosen = None
        if self.shards is not None and self.spec.layout.shards == "auto":
            with suppress(LayoutError):
                chosen = self._choose(machines, self.shards, known)
        if chosen is None:
            chosen = self._choose(machines, self.spec.layout.shards, known)
        return self._found(machines, chosen, known)

    def _choose(
        self, machines: Machines, shards: int | Auto, known: dict[tuple[Any, ...], ReplicaPlan]
    ) -> Chosen:
        spec, config, count = self.spec, self.planner.config, self.count
        stages, hosts = spec.layout.stages, machines.ranks_per_host
        if count != "auto":
            found = replicas.choose(config, machines.ranks, count, stages, shards, hosts)
            _refuse_unlike(spec, found)
            return Chosen(found, "layout.replicas says so")
        try:
            one = replicas.choose(config, machines.ranks, 1, stages, shards, hosts)
        except LayoutError as error:  # there may be more ranks than one copy of the model can be cut into
            several, reason = self._most(machines, shards, known)
            if several is None:
                raise error
            return Chosen(several, reason)
        if len(hosts) == 1:
            return Chosen(one, "all ranks are on one host, whose memory one copy of the model uses best")
        if spec.wire.between_stages != "f32":
            return Chosen(one, "answers depend on the number of stages (wire.between_stages)")
        several, reason = self._most(machines, one[0].shards, known)
        return Chosen(several or one, reason)

    def _most(
        self, machines: Machines, shards: int | Auto, known: dict[tuple[Any, ...], ReplicaPlan]
    ) -> tuple[Replicas | None, str]:
        """As many replicas of at least a host each as there are requests for and memory suffices for, and why."""
        hosts = len(machines.ranks_per_host)
        most = hosts if self.requests is None else min(hosts, self.requests)
        refusal = "there are no more requests" if most < hosts else ""
        stages = self.spec.layout.stages
        for number in range(most, 1, -1):
            with suppress(LayoutError):
                found = replicas.choose(
                    self.planner.config, machines.ranks, number, stages, shards, machines.ranks_per_host
                )
                too_much = _too_much(machines, self._plans(machines, found, known))
                if too_much is None:
                    return found, f"each holds the whole model in memory{refusal and f'; {refusal}'}"
                refusal = f"with {number} {too_much}"
        return None, refusal or "layout.stages and layout.shards leave no other choice"

    def _others(
        self, machines: Machines, rule: Found, known: dict[tuple[Any, ...], ReplicaPlan]
    ) -> Iterator[Replicas]:
        """Other layouts: each number of replicas with each number of shards, and replicas of unlike size."""
        given, hosts, tried = self.spec.layout, machines.ranks_per_host, {rule.chosen.replicas}
        counts = _counts(len(hosts), self.requests) if self.count == "auto" else [self.count]
        cuts: list[int] = [given.shards] if given.shards != "auto" else []
        if not cuts:
            cuts = [1 << power for power in range(self.planner.config.max_shards.bit_length())]
            if self.shards in cuts:
                cuts = [self.shards]
        for number, shards in itertools.product(counts, cuts):
            with suppress(LayoutError):
                found = replicas.choose(
                    self.planner.config, machines.ranks, number, given.stages, shards, hosts
                )
                if found not in tried:
                    tried.add(found)
                    yield found
        for shards in cuts if self.count == "auto" and given.stages == "auto" else ():
            found = self._smallest(machines, shards, known)
            if found and found not in tried and len(found) <= (self.requests or len(found)):
                tried.add(found)
                yield found

    def _smallest(
        self, machines: Machines, shards: int, known: dict[tuple[Any, ...], ReplicaPlan]
    ) -> Replicas:
        """Replicas of as few neighbouring hosts each as hold the model; what is left at the end joins the last one."""
        found, first, end = list[Replica](), 0, 0
        most = self.planner.config.n_layers * shards
        for ranks in machines.ranks_per_host:
            end += ranks
            if (end - first) % shards or end - first > most:
                continue
            one = Replica(first, (end - first) // shards, shards)
            alone = self._with_layers_by_speed(machines, Chosen((one,), "", "f32"), known).replicas
            if _too_much(machines, self._plans(machines, alone, known)) is None:
                found.append(one)
                first = end
        if found and first < end:
            last = found.pop()
            size = end - last.first
            if size % shards or size > most:
                return ()
            found.append(Replica(last.first, size // shards, shards))
        return tuple(found)

    def _too_short(self, found: Found) -> bool:
        """Whether its replicas, if there are several, do not all hold the whole model and a long request."""
        return len(found.plans) > 1 and _too_much(found.machines, found.plans) is not None

    def _plans(
        self, machines: Machines, found: Replicas, known: dict[tuple[Any, ...], ReplicaPlan]
    ) -> Iterator[ReplicaPlan]:
        return self.planner.replicas(self.spec, found, self.asked, machines.names, known)

    def _found(self, machines: Machines, chosen: Chosen, known: dict[tuple[Any, ...], ReplicaPlan]) -> Found:
        """A layout with its wire, its layers by speed, and its time."""
        if not chosen.wire_reason:
            chosen = self._with_wire(machines, chosen, known)
        chosen = self._with_layers_by_speed(machines, chosen, known)
        plans, spec = list(self._plans(machines, chosen.replicas, known)), with_wire(self.spec, chosen.wire)
        demand = demand_of(self.asked)
        time = estimate(spec, self.planner.config, machines, chosen.replicas, plans, demand)
        return Found(machines, chosen, plans, time)

    def _with_wire(
        self, machines: Machines, chosen: Chosen, known: dict[tuple[Any, ...], ReplicaPlan]
    ) -> Chosen:
        """The same with the wire between shards, where the job leaves it open too."""
        given = self.spec.wire.activations
        if given != "auto":
            return replace(chosen, wire=given, wire_reason="wire.activations says so")
        if not shards_cross_hosts(machines, chosen.replicas):
            return replace(chosen, wire="f32", wire_reason="those of a stage share a host")
        plans = list(self._plans(machines, chosen.replicas, known))
        wire, reason = decided(self.spec, self.planner.config, machines, chosen.replicas, plans, self.asked)
        return replace(chosen, wire=wire, wire_reason=reason)

    def _with_layers_by_speed(
        self, machines: Machines, chosen: Chosen, known: dict[tuple[Any, ...], ReplicaPlan]
    ) -> Chosen:
        """The same with more layers on faster stages, as their memory allows, where the speeds of ranks are known."""
        if not machines.speeds or all(replica.stages == 1 for replica in chosen.replicas):
            return chosen
        spec, found, uneven = with_wire(self.spec, chosen.wire), list(chosen.replicas), list[str]()
        for number, plan in enumerate(self._plans(machines, chosen.replicas, known)):
            replica = found[number]
            if replica.stages > 1:
                layers = stage_layers_by_speed(spec, self.planner.config, machines, replica, plan, self.asked)
                if layers is not None:
                    found[number] = replace(replica, layers=layers)
                    uneven.append("-".join(map(str, layers)))
        if not uneven:
            return chosen
        reason = f"{chosen.reason}; layers by speed and memory: {', '.join(dict.fromkeys(uneven))}"
        return replace(chosen, replicas=tuple(found), reason=reason)


def _counts(hosts: int, requests: int | None) -> list[int]:
    """The numbers of replicas that are tried on so many hosts."""
    most = hosts if requests is None else max(min(hosts, requests), 1)
    if most <= ALL_COUNTS:
        return list(range(1, most + 1))
    return [most >> power for power in range(most.bit_length())]


def _compared(best: Found, found: list[Found]) -> str:
    """How much longer the next best would take."""
    others = [other for other in found if other.chosen.replicas != best.chosen.replicas]
    if not others:
        return ""
    second = min(others, key=lambda other: (not other.fits, other.time.seconds))
    what = described(second.chosen.replicas)
    if not second.fits:
        return f"no other of {len(found)} layouts fits"
    times = second.time.seconds / best.time.seconds
    return f"the best of {len(found)} layouts tried; {what} would take {times:.2f} times as long"


def described(found: Replicas) -> str:
    """Replicas in words, by the first of them."""
    first = found[0]
    count = f"{len(found)} replicas of " if len(found) > 1 else ""
    stages, shards = (
        f"{number} {kind}{'' if number == 1 else 's'}"
        for number, kind in ((first.stages, "stage"), (first.shards, "shard"))
    )
    return f"{count}{stages} x {shards}"


def _refuse_unlike(spec: Spec, found: Replicas) -> None:
    """LayoutError if answers would depend on which replica gives them."""
    if spec.wire.between_stages != "f32" and len({replica.stages for replica in found}) > 1:
        raise LayoutError(
            f"{found[-1].ranks.stop} ranks as {len(found)} replicas have different numbers of stages, on which answers "
            'depend with wire.between_stages = "q8_0"; set it to "f32", or change layout.replicas.'
        )


def _too_much(machines: Machines, plans: Iterable[ReplicaPlan]) -> str | None:
    """Why replicas do not hold the whole model in memory; None if they do."""
    for plan in plans:
        if 0 < plan.cached_tokens < plan.max_context:
            return (
                f"the KV cache of each would hold {plan.cached_tokens} tokens (memory.kv, memory.max_context)"
            )
        for rank in plan.ranks:
            if rank.weights_streamed:
                return "some rank would read weights from disk in each step (memory.weights)"
            if rank.held > machines.free[rank.rank]:
                free = shown_bytes(machines.free[rank.rank])
                return f"rank {rank.rank} would hold {shown_bytes(rank.held)}, and {free} are free"
    return None
