"""The rule for the replicas, stages and shards of a job: as many replicas as there are hosts that can hold the model.

Replicas work on different requests and exchange few messages, so they are faster than the same hosts as one pipeline,
in which each of N stages waits for N - 1 messages for a token and computes only a part of the sequences at a time. A
second replica on a host gains nothing, because both read their weights from the same memory.
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
    """Return the layout with `count` replicas ("auto": by the rule) of `shards` shards; LayoutError if impossible.

    `requests` is the number of requests of the input (None: unknown).
    """
    spec, machines = planner.spec, planner.machines
    stages, hosts = spec.layout.stages, machines.ranks_per_host
    if count != "auto":
        found = replicas.choose(planner.config, machines.ranks, count, stages, shards, hosts)
        _refuse_unlike(spec, found)
        return Chosen(found, "layout.replicas says so")
    try:
        one = replicas.choose(planner.config, machines.ranks, 1, stages, shards, hosts)
    except LayoutError as error:  # one replica may be impossible because there are too many ranks for it
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
    """Return the layout with most replicas of at least one host each that requests and memory allow, and the reason."""
    machines, stages = planner.machines, planner.spec.layout.stages
    hosts = len(machines.ranks_per_host)
    maximum = hosts if requests is None else min(hosts, requests)
    refusal = "there are no more requests" if maximum < hosts else ""
    for number in range(maximum, 1, -1):
        with suppress(LayoutError):
            found = replicas.choose(
                planner.config, machines.ranks, number, stages, shards, machines.ranks_per_host
            )
            too_much = planner.too_much(planner.plans(Chosen(found, "")))
            if too_much is None:
                return found, f"each holds the whole model in memory{refusal and f'; {refusal}'}"
            refusal = f"with {number} {too_much}"
    return None, refusal or "layout.stages and layout.shards leave no other choice"


def _refuse_unlike(spec: Spec, found: Replicas) -> None:
    """Raise LayoutError if answers would depend on the replica that computes them."""
    if spec.wire.between_stages != "f32" and len({replica.stages for replica in found}) > 1:
        raise LayoutError(
            f"{found[-1].ranks.stop} ranks as {len(found)} replicas have different numbers of stages, on which answers "
            'depend with wire.between_stages = "q8_0"; set it to "f32", or change layout.replicas.'
        )
