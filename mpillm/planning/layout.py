"""Which replicas, stages and shards a job gets where it leaves that open: as many replicas as its hosts can hold.

Replicas work on different requests and hardly talk, so they are faster than the same hosts as one pipeline: each of N
stages waits for N - 1 messages a token, and computes with only a share of the sequences at a time. Within a host a
second replica gains nothing, because its weights are read from the same memory.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mpillm.comm.collectives import Wire
from mpillm.errors import LayoutError
from mpillm.model.config import ModelConfig
from mpillm.partition import replicas
from mpillm.partition.grid import Auto
from mpillm.partition.replicas import Replicas
from mpillm.planning.estimate import stage_layers_by_speed
from mpillm.planning.input_memory import InputNeeds
from mpillm.planning.machines import Machines
from mpillm.planning.rank_plan import ReplicaPlan, replica_plans
from mpillm.planning.wire import decided, shards_cross_hosts, with_wire
from mpillm.spec import Spec, shown_bytes
from mpillm.weights.source import Source


@dataclass(frozen=True)
class Chosen:
    """A layout, and in a few words why there are as many replicas, and why shards send what they sum like this."""

    replicas: Replicas
    reason: str
    wire: Wire = "f32"  # between the shards of a stage
    wire_reason: str = ""


def choose(
    spec: Spec,
    source: Source,
    config: ModelConfig,
    machines: Machines,
    count: int | Auto,
    requests: int | None = None,
    shards: int | None = None,
    asked: InputNeeds = InputNeeds(),  # noqa: B008
) -> Chosen:
    """Lay `count` replicas out on all ranks; LayoutError if that is impossible.

    `requests` is their number, None if it is not known, and `asked` what they ask for. So many shards as `shards` are
    taken where the job leaves it open and they work.
    """
    chosen = None
    if shards is not None and spec.layout.shards == "auto":
        with suppress(LayoutError):
            chosen = _choose(spec, source, config, machines, count, requests, shards, asked)
    if chosen is None:
        chosen = _choose(spec, source, config, machines, count, requests, spec.layout.shards, asked)
    chosen = _with_wire(spec, source, config, machines, chosen, asked)
    return _with_layers_by_speed(with_wire(spec, chosen.wire), source, config, machines, chosen, asked)


def _choose(
    spec: Spec,
    source: Source,
    config: ModelConfig,
    machines: Machines,
    count: int | Auto,
    requests: int | None,
    shards: int | Auto,
    asked: InputNeeds,
) -> Chosen:
    stages, hosts = spec.layout.stages, machines.ranks_per_host
    if count != "auto":
        found = replicas.choose(config, machines.ranks, count, stages, shards, hosts)
        _refuse_unlike(spec, found)
        return Chosen(found, "layout.replicas says so")
    try:
        one = replicas.choose(config, machines.ranks, 1, stages, shards, hosts)
    except LayoutError as error:  # there may be more ranks than one copy of the model can be cut into
        several, reason = _most(spec, source, config, machines, requests, shards, asked)
        if several is None:
            raise error
        return Chosen(several, reason)
    if len(hosts) == 1:
        return Chosen(one, "all ranks are on one host, whose memory one copy of the model uses best")
    if spec.wire.between_stages != "f32":
        return Chosen(one, "answers depend on the number of stages (wire.between_stages)")
    several, reason = _most(spec, source, config, machines, requests, one[0].shards, asked)
    return Chosen(several or one, reason)


def _with_wire(
    spec: Spec, source: Source, config: ModelConfig, machines: Machines, chosen: Chosen, asked: InputNeeds
) -> Chosen:
    """The same with the wire between shards, where the job leaves it open too."""
    given = spec.wire.activations
    if given != "auto":
        return replace(chosen, wire=given, wire_reason="wire.activations says so")
    if not shards_cross_hosts(machines, chosen.replicas):
        return replace(chosen, wire="f32", wire_reason="those of a stage share a host")
    plans = list(replica_plans(spec, source, config, chosen.replicas, asked, machines.names))
    wire, reason = decided(spec, config, machines, chosen.replicas, plans, asked)
    return replace(chosen, wire=wire, wire_reason=reason)


def _with_layers_by_speed(
    spec: Spec, source: Source, config: ModelConfig, machines: Machines, chosen: Chosen, asked: InputNeeds
) -> Chosen:
    """The same with more layers on faster stages, as their memory allows, where the speeds of ranks are known."""
    if not machines.speeds:
        return chosen
    found, uneven = list(chosen.replicas), list[str]()
    plans = replica_plans(spec, source, config, found, asked, machines.names)
    for number, plan in enumerate(list(plans)):
        replica = found[number]
        if replica.stages > 1:
            layers = stage_layers_by_speed(spec, config, machines, replica, plan, asked)
            if layers is not None:
                found[number] = replace(replica, layers=layers)
                uneven.append("-".join(map(str, layers)))
    if not uneven:
        return chosen
    reason = f"{chosen.reason}; layers by speed and memory: {', '.join(dict.fromkeys(uneven))}"
    return replace(chosen, replicas=tuple(found), reason=reason)


def _most(
    spec: Spec,
    source: Source,
    config: ModelConfig,
    machines: Machines,
    requests: int | None,
    shards: int | Auto,
    asked: InputNeeds,
) -> tuple[Replicas | None, str]:
    """As many replicas of at least a host each as there are requests for and memory suffices for, and why."""
    hosts = len(machines.ranks_per_host)
    most = hosts if requests is None else min(hosts, requests)
    refusal = "there are no more requests" if most < hosts else ""
    known: dict[tuple[Any, ...], ReplicaPlan] = {}
    for number in range(most, 1, -1):
        with suppress(LayoutError):
            found = replicas.choose(
                config, machines.ranks, number, spec.layout.stages, shards, machines.ranks_per_host
            )
            too_much = _too_much(spec, source, config, machines, found, asked, known)
            if too_much is None:
                return found, f"each holds the whole model in memory{refusal and f'; {refusal}'}"
            refusal = f"with {number} {too_much}"
    return None, refusal or "layout.stages and layout.shards leave no other choice"


def _refuse_unlike(spec: Spec, found: Replicas) -> None:
    """LayoutError if answers would depend on which replica gives them."""
    if spec.wire.between_stages != "f32" and len({replica.stages for replica in found}) > 1:
        raise LayoutError(
            f"{found[-1].ranks.stop} ranks as {len(found)} replicas have different numbers of stages, on which answers "
            'depend with wire.between_stages = "q8_0"; set it to "f32", or change layout.replicas.'
        )


def _too_much(
    spec: Spec,
    source: Source,
    config: ModelConfig,
    machines: Machines,
    found: Replicas,
    asked: InputNeeds,
    known: dict[tuple[Any, ...], ReplicaPlan],
) -> str | None:
    """Why these replicas do not hold the whole model in memory; None if they do."""
    for plan in replica_plans(spec, source, config, found, asked, machines.names, known):
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
