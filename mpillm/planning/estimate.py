"""Estimate how long a job takes on a layout, and what limits it, from the speeds of its machines and `stage_time`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from mpillm.comm.transfer import Wire
from mpillm.model.cache_layout import blocks_needed
from mpillm.partition import grid
from mpillm.partition.replicas import Replica
from mpillm.planning.input_needs import InputNeeds
from mpillm.planning.job_time import Demand, JobTime, job_time, loading_time, shared_time
from mpillm.planning.placement import Placement
from mpillm.planning.rank_plan import ReplicaPlan
from mpillm.planning.stage_time import Stage, round_of, stage_time
from mpillm.planning.step_time import StepRows, rank_time

# Layers or requests are divided unevenly only if that makes the run faster by this factor.
UNEVEN = 1.1
DEAR = 1.05  # the wire is Q8_0 if f32 takes DEAR times as long
IDLE = 1.25  # a replica is idle if one request takes it IDLE times as long as the whole job takes
TYPICAL = Demand(requests=256, prompt=256 * 256.0, generated=256 * 128.0)  # stands for an unknown input


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The estimated time of a job.

    A step is one round of all running sequences through the stages of the first replica that computes.
    """

    measured: bool  # all speeds are measured; otherwise some are assumed
    of_input: bool  # the tokens are those of the input; otherwise those of TYPICAL
    requests: int  # sequences; each choice counts
    prompt_tokens: int  # an estimate
    generated_tokens: int  # the maximum
    seconds: float  # of the whole job
    rate: float  # tokens/s, of prompts and answers together
    prefill: float  # tokens/s of prompts while nothing is generated
    decode: float  # generated tokens/s while no prompts are computed
    decode_one: float  # generated tokens/s if one sequence runs alone
    sequences: int  # sequences that run at once in all replicas together
    step: float  # seconds of a step
    limit: str  # the part of a step that takes most of its time
    slowest: str  # the rank that the others wait for
    micro_batches: int
    bubble: float  # the part of a step in which stages wait for each other
    idle: list[int]  # replicas that get no request because they are too slow


def demand_of(asked: InputNeeds) -> Demand | None:
    """Return the demand of an input; None if it has no requests."""
    if not asked.sequences or not asked.prompt_tokens + asked.generated_tokens:
        return None
    return Demand(asked.sequences, asked.prompt_tokens, asked.generated_tokens, asked.scored_tokens)


def estimate(placement: Placement, given: Demand | None) -> Estimate:
    """Estimate the time of a demand (None: TYPICAL) on replicas that share the requests by their speeds.

    Replicas without a request leave the cores that they share to the others.
    """
    demand, machines = given or TYPICAL, placement.machines
    kinds = _kinds(placement, demand, range(len(placement.replicas)))
    seconds, requests = _shared(kinds, demand)
    idle = [
        number
        for kind, own in zip(kinds, requests, strict=True)
        if not own and kind.seconds(1) > IDLE * seconds
        for number in kind.numbers
    ]
    used = _with_requests(kinds, requests, demand)
    if len(used) < len(placement.replicas):
        placement = placement.while_others_idle(used)
        kinds = _kinds(placement, demand, used)
        seconds, requests = _shared(kinds, demand)
    times = [kind.time(max(own, 1)) for kind, own in zip(kinds, requests, strict=True)]
    busy = [
        min(len(kind.numbers), demand.requests) if own else 0
        for kind, own in zip(kinds, requests, strict=True)
    ]
    first, stages = times[0], kinds[0].stages
    replica = placement.replicas[used[0]]
    slowest = first.decode_round.slowest * replica.shards + replica.first
    return Estimate(
        measured=machines.measured,
        of_input=given is not None,
        requests=demand.requests,
        prompt_tokens=int(demand.prompt),
        generated_tokens=int(demand.generated),
        seconds=seconds,
        rate=(demand.prompt + demand.generated) / seconds,
        prefill=sum(count * time.prefill_rate for count, time in zip(busy, times, strict=True)),
        decode=sum(count * time.decode_rate for count, time in zip(busy, times, strict=True)),
        decode_one=1 / round_of(stages, StepRows(1, 1, demand.context)).seconds,
        sequences=int(sum(count * time.sequences for count, time in zip(busy, times, strict=True))),
        step=first.decode_round.seconds,
        limit=first.decode_round.stage.limit,
        slowest=f"rank {slowest}" + (f" on {machines.names[slowest]}" if machines.names else ""),
        micro_batches=first.decode_round.micro_batches,
        bubble=first.decode_round.bubble,
        idle=idle,
    )


def faster_wire(placement: Placement, demand: Demand | None) -> tuple[Wire, str]:
    """Return the wire for shards on several hosts, and the reason: Q8_0 if f32 takes DEAR times as long, else f32."""
    exact, rounded = (estimate(placement.with_wire(wire), demand).seconds for wire in ("f32", "q8_0"))
    times = exact / rounded
    if times < DEAR:
        return "f32", "the network between the hosts makes f32 no slower"
    return "q8_0", f"over the network between the hosts f32 would take {100 * (times - 1):.0f} % longer"


class _Kind:
    """Replicas that are equally fast: their numbers, and the time that each takes for a part of a demand."""

    def __init__(self, stages: Sequence[Stage], replica: Replica, plan: ReplicaPlan, demand: Demand) -> None:
        self.stages, self.numbers = stages, list[int]()
        self._replica, self._plan, self._demand = replica, plan, demand
        self._known: dict[int, JobTime] = {}
        self._loading = loading_time(stages, plan.ranks)

    def time(self, requests: int) -> JobTime:
        """Return the time that one of them takes for `requests` requests."""
        if requests not in self._known:
            own = self._demand.of(requests)
            sequences = at_once(self._plan, self._replica, own)
            self._known[requests] = job_time(
                self.stages, own, self._plan.step.tokens, sequences, self._loading
            )
        return self._known[requests]

    def seconds(self, requests: int) -> float:
        """Return the seconds that one of them takes for `requests` requests."""
        return self.time(requests).seconds


def _kinds(placement: Placement, demand: Demand, numbers: Iterable[int]) -> list[_Kind]:
    found = dict[tuple[object, ...], _Kind]()
    for number in numbers:
        replica, plan, key = placement.replicas[number], placement.plans[number], placement.kind(number)
        if key not in found:
            found[key] = _Kind(placement.stages(number), replica, plan, demand)
        found[key].numbers.append(number)
    return list(found.values())


def _shared(kinds: Sequence[_Kind], demand: Demand) -> tuple[float, list[int]]:
    """Return the seconds of a demand on all replicas, and how many requests a replica of each kind computes."""
    return shared_time(
        [kind.seconds for kind in kinds], [len(kind.numbers) for kind in kinds], demand.requests
    )


def _with_requests(kinds: Sequence[_Kind], requests: Sequence[int], demand: Demand) -> list[int]:
    """Return the replicas that get a request: if there are fewer requests than replicas, the fastest ones."""
    able = sorted(
        (kind.seconds(1), number)
        for kind, own in zip(kinds, requests, strict=True)
        if own
        for number in kind.numbers
    )
    return sorted(number for _, number in able[: demand.requests])


def stage_layers_by_speed(placement: Placement, number: int, asked: InputNeeds) -> tuple[int, ...] | None:
    """Return the number of layers that each stage of a replica should have; None if an even division is about as fast.

    The layers of `placement` must be divided evenly.
    """
    spec, config, machines = placement.spec, placement.config, placement.machines
    replica, plan, stages = placement.replicas[number], placement.plans[number], placement.stages(number)
    demand = demand_of(asked) or TYPICAL
    count = max(min(at_once(plan, replica, demand), demand.requests) / len(stages), 1.0)
    batch = StepRows(count, count, demand.context)
    layers = [stage.works[0].layers for stage in stages]
    bare = [replace(stage, works=[work.without_layers() for work in stage.works]) for stage in stages]
    whole, extra = ([stage_time(stage, batch).total for stage in of] for of in (stages, bare))
    seconds = [(all_of - own) / number for all_of, own, number in zip(whole, extra, layers, strict=True)]
    maximum = []
    for stage, own in enumerate(layers):
        ranks = plan.ranks[stage * replica.shards : (stage + 1) * replica.shards]
        free = min(
            (machines.free[rank.rank] - (rank.held - rank.weights_held - rank.kv_held))
            / max((rank.weights_share + rank.kv_held) / own, 1)
            for rank in ranks
        )
        maximum.append(max(int(free + 1e-9), 1) if spec.memory.weights == "all" else config.n_layers)
    found = grid.layers_by_speed(config.n_layers, seconds, extra, maximum)
    slowest = max(count * each + own for count, each, own in zip(found, seconds, extra, strict=True))
    too_many = any(own > capacity for own, capacity in zip(layers, maximum, strict=True))
    return found if too_many or slowest * UNEVEN < max(whole) else None


def replica_shares(placement: Placement, given: Demand | None) -> list[float]:
    """Return the part of the requests that each replica should compute so that all end at the same time.

    The parts are equal if speeds are not known, or if they differ by less than the error of a short measurement.
    """
    replicas, demand = len(placement.replicas), given or TYPICAL
    even = [1 / replicas] * replicas
    if not placement.machines.speeds or replicas == 1:
        return even
    kinds = _kinds(placement, demand, range(replicas))
    takes = [kind.seconds(max(round(demand.requests / replicas), 1)) for kind in kinds]
    if max(takes) < UNEVEN * min(takes):
        return even
    _, requests = _shared(kinds, demand)
    own = {number: count for kind, count in zip(kinds, requests, strict=True) for number in kind.numbers}
    return [own[number] / sum(own.values()) for number in range(replicas)]


def rank_seconds(placement: Placement, given: Demand | None) -> list[float]:
    """For each rank, the seconds of its own work, without messages, in a step with one token of each sequence."""
    demand, replicas, found = given or TYPICAL, placement.replicas, []
    for replica, plan in zip(replicas, placement.plans, strict=True):
        own = Demand(max(demand.requests // len(replicas), 1), demand.prompt, demand.generated)
        count = max(min(at_once(plan, replica, own), own.requests) / replica.stages, 1.0)
        batch = StepRows(count, count, demand.context)
        found += [
            rank_time(work, placement.machines.speed_of(rank), batch).total
            for work, rank in zip(plan.works, replica.ranks, strict=True)
        ]
    return found


def at_once(plan: ReplicaPlan, replica: Replica, demand: Demand) -> float:
    """Return the number of sequences of average length that steps and the KV cache allow to run at once."""
    windows = plan.caches[0].windows
    maximum = plan.capacity.sequences(plan.step.sequences, windows) * replica.stages
    if not windows:
        return maximum
    length = int((demand.prompt + demand.generated) / max(demand.requests, 1))
    return max(min(maximum, plan.capacity.blocks // max(blocks_needed(max(length, 1), windows), 1)), 1)
