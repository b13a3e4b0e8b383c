"""Choose the replicas, stages and shards that a job leaves open: those with which it takes the least time.

The first candidate is that of `layout_rule`. If the speeds of several hosts are known, other numbers of replicas and
shards are compared with it by their estimated times, and one that is clearly faster is chosen.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mpillm.errors import LayoutError
from mpillm.partition import replicas
from mpillm.partition.grid import Auto
from mpillm.partition.replicas import Replica, Replicas
from mpillm.planning.input_needs import NO_INPUT, InputNeeds
from mpillm.planning.layout_plans import Chosen, Found, LayoutPlanner
from mpillm.planning.layout_rule import by_rule
from mpillm.planning.machines import Machines
from mpillm.planning.planner import Planner
from mpillm.planning.rank_plan import ReplicaPlan
from mpillm.spec import Spec
from mpillm.words import count_of

CLEARLY = 1.02  # another layout is chosen if the rule's takes more than CLEARLY times as long
NAMED = 4  # the maximum number of kinds of replicas in a sentence
ALL_COUNTS = 8  # up to this number of hosts, every number of replicas is tried; beyond it, every halving


@dataclass(frozen=True)
class Layouts:
    """Chooses the layouts of a job on given machines.

    `count` is the number of replicas, `requests` the number of requests of the input (None: unknown), and `asked` what
    they ask for. If the job leaves the number of shards open, it is `shards`, provided that this number works.
    """

    spec: Spec
    planner: Planner
    count: int | Auto
    requests: int | None = None
    shards: int | None = None
    asked: InputNeeds = NO_INPUT
    _known: dict[tuple[Any, ...], ReplicaPlan] = field(default_factory=dict, init=False, compare=False)

    def choose(self, machines: Machines) -> Found:
        """Return the fastest layout on all ranks of these machines; LayoutError if no layout is possible."""
        planner = self._planner_of(machines)
        rule = planner.found(self._by_rule(planner))
        if not self._open(machines):
            return rule
        best, others = rule, list[Found]()
        for replicas_of in self._others(planner, rule):
            found = planner.found(Chosen(replicas_of, "by the model of a step's time"))
            several = len(found.plans) > 1
            # Each replica must get a request, except a slow one of rank 0, which cannot be left out.
            idle, enough = found.time.idle, self.requests or len(found.plans)
            busy = set(idle) <= {0} and len(found.plans) - len(idle) <= enough
            if busy and found.fits and not (several and planner.too_much(found.plans)):
                others.append(found)
        for found in others:
            if (found.fits, -found.cost) > (best.fits, -best.cost):
                best = found
        if rule.fits == best.fits and rule.cost <= CLEARLY * best.cost:
            best = rule
        return replace(best, chosen=replace(best.chosen, compared=_compared(best, [rule, *others])))

    def of_one(self, machines: Machines, stages: int, shards: int) -> Found:
        """Return one replica of `stages` x `shards` ranks on all of these machines; LayoutError if impossible."""
        planner = self._planner_of(machines)
        found = replicas.choose(planner.config, machines.ranks, 1, stages, shards, machines.ranks_per_host)
        return planner.found(Chosen(found, ""))

    def _planner_of(self, machines: Machines) -> LayoutPlanner:
        return LayoutPlanner(self.spec, self.planner, self.asked, machines, self._known)

    def _open(self, machines: Machines) -> bool:
        """Return whether other layouts than the rule's are compared."""
        several = len(machines.ranks_per_host) > 1
        return several and bool(machines.speeds) and self.spec.wire.between_stages == "f32"

    def _by_rule(self, planner: LayoutPlanner) -> Chosen:
        """Return the layout of the rule, with `self.shards` if that is possible."""
        given = self.spec.layout.shards
        if self.shards is not None and given == "auto":
            with suppress(LayoutError):
                return by_rule(planner, self.count, self.shards, self.requests)
        return by_rule(planner, self.count, given, self.requests)

    def _others(self, planner: LayoutPlanner, rule: Found) -> Iterator[Replicas]:
        """Other layouts: each number of replicas with each number of shards, and replicas of different sizes."""
        given, machines, tried = self.spec.layout, planner.machines, {rule.chosen.replicas}
        hosts = machines.ranks_per_host
        # One replica more than requests: rank 0's host cannot be left out, but its replica may get no request.
        most = None if self.requests is None else self.requests + 1
        counts = _counts(len(hosts), most) if self.count == "auto" else [self.count]
        cuts: list[int] = [given.shards] if given.shards != "auto" else []
        if not cuts:
            cuts = [1 << power for power in range(planner.config.max_shards.bit_length())]
            if self.shards in cuts:
                cuts = [self.shards]
        for number, shards in itertools.product(counts, cuts):
            with suppress(LayoutError):
                found = replicas.choose(planner.config, machines.ranks, number, given.stages, shards, hosts)
                if found not in tried and (machines.links_known or number == len(hosts)):
                    tried.add(found)
                    yield found
        unlike = machines.links_known and self.count == "auto" and given.stages == "auto"
        for shards in cuts if unlike else ():
            found = _smallest(planner, shards)
            if found and found not in tried and len(found) <= (most or len(found)):
                tried.add(found)
                yield found


def _smallest(planner: LayoutPlanner, shards: int) -> Replicas:
    """Replicas of as few neighbouring hosts each as can hold the model; the remaining hosts join the last replica."""
    found, first, end = list[Replica](), 0, 0
    maximum = planner.config.n_layers * shards
    for ranks in planner.machines.ranks_per_host:
        end += ranks
        if (end - first) % shards or end - first > maximum:
            continue
        one = Replica(first, (end - first) // shards, shards)
        alone = planner.with_layers_by_speed(Chosen((one,), "", "f32"))
        if planner.too_much(planner.plans(alone)) is None:
            found.append(one)
            first = end
    if found and first < end:
        last = found.pop()
        size = end - last.first
        if size % shards or size > maximum:
            return ()
        found.append(Replica(last.first, size // shards, shards))
    return tuple(found)


def _counts(hosts: int, most: int | None) -> list[int]:
    """Return the numbers of replicas that are tried on `hosts` hosts, up to `most`."""
    maximum = hosts if most is None else min(hosts, most)
    if maximum <= ALL_COUNTS:
        return list(range(1, maximum + 1))
    return [maximum >> power for power in range(maximum.bit_length())]


def _compared(best: Found, found: list[Found]) -> str:
    """Say how much longer the second best layout would take."""
    others = [other for other in found if other.chosen.replicas != best.chosen.replicas]
    if not others:
        return ""
    second = min(others, key=lambda other: (not other.fits, other.time.seconds))
    what = replicas_in_words(second.chosen.replicas)
    if not second.fits:
        return f"no other of {len(found)} layouts fits"
    times = second.time.seconds / best.time.seconds
    if times < 1.005:  # below 1 the rule's layout was kept: the other one is not clearly faster (CLEARLY)
        return f"as good as any of {len(found)} layouts tried; {what} would take about as long"
    return f"the best of {len(found)} layouts tried; {what} would take {times:.2f} times as long"


def replicas_in_words(found: Replicas) -> str:
    """Replicas in words."""
    return shapes_in_words([(replica.stages, replica.shards) for replica in found])


def shapes_in_words(shapes: Sequence[tuple[int, int]]) -> str:
    """Replicas in words, from the stages and shards of each."""
    kinds = {
        f"{count_of(stages, 'stage')} x {count_of(shards, 'shard')}": count
        for (stages, shards), count in Counter(shapes).items()
    }
    if len(shapes) == 1:
        return next(iter(kinds))
    if len(kinds) == 1:
        return f"{len(shapes)} replicas of {next(iter(kinds))}"
    if len(kinds) <= NAMED:
        named = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        return f"{len(shapes)} replicas ({named})"
    ranks = [stages * shards for stages, shards in shapes]
    return f"{len(shapes)} replicas of {min(ranks)} to {max(ranks)} ranks"
