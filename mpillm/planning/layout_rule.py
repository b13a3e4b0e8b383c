"""The rule by which a job gets its replicas, stages and shards: as many replicas as hosts can hold the model.

Replicas work on different requests and hardly talk, so they are faster than the same hosts as one pipeline: each of N
stages waits for N - 1 messages a token, and computes with only a share of the sequences at a time. Within a host a
second replica gains nothing, because its weights are read from the same memory.
"""

from __future__ import annotations

from contextlib import suppress

from mpillm.errors import LayoutError
from mpillm.partition import replicas
from mpillm.partition.grid import Auto
from mpillm.partition.replicas import Replicas
from mpillm.planning.layout_plans import Chosen, LayoutPlanner
from mpillm.spec import Spec


def by_rule(planner: LayoutPlanner, count: int | Auto, shards: int | Auto, requests: int | None) -> Chosen:
    """`count` replicas, or as many as the rule says, of so many shards; LayoutError if there is no such layout.

    `requests` is the number of the input's, None if it is not known.
    """
    spec, machines = planner.spec, planner.machines
    stages, hosts = spec.layout.stages, machines.ranks_per_host
    if count != "auto":
        found = replicas.choose(planner.config, machines.ranks, count, stages, shards, hosts)
        _refuse_unlike(spec, found)
        return Chosen(found, "layout.replicas says so")
    try:
        one = replicas.choose(planner.config, machines.ranks, 1, stages, shards, hosts)
    except LayoutError as error:  # there may be more ranks than one copy of the model can be cut into
        several, reason = _as_many_as_possible(planner, shards, requests)
        if several is None:
            raise error
        return Chosen(several, reason)
    if len(hosts) == 1:
        return Chosen(one, "all ranks are on one host, whose memory one copy of the model uses best")
    if spec.wire.between_stages != "f32":
        return Chosen(one, "answers depend on the number of stages (wire.between_stages)")
    several, reason = _as_many_as_possible(planner, one[0].shards, requests)
    return Chosen(several or one, reason)


def _as_many_as_possible(
    planner: LayoutPlanner, shards: int | Auto, requests: int | None
) -> tuple[Replicas | None, str]:
    """Return the maximum of replicas, of at least a host each, that requests and memory suffice for; and why."""
    machines, stages = planner.machines, planner.spec.layout.stages
    hosts = len(machines.ranks_per_host)
    maximum = hosts if requests is None else min(hosts, requests)
    refusal = "there are no more requests" if maximum < hosts else ""
    for number in range(maximum, 1, -1):
        with suppress(LayoutError):
            found = replicas.choose(
                planner.config, machines.ranks, number, stages, shards, machines.ranks_per_host
            )
            too_much = planner.too_much(planner.plans(found))
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
