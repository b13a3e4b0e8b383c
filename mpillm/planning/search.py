"""Choose the hosts of a job by its estimated time: all of them, or all but those that would slow it down.

A host can slow a run down if a replica needs several hosts, because the others wait for a slow stage or a slow network.
It can also do so if there are not enough requests for all hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from mpillm.errors import IMPOSSIBLE, LayoutError
from mpillm.planning.layout import Layouts
from mpillm.planning.layout_plans import Found
from mpillm.planning.machines import Machines
from mpillm.spec import Spec
from mpillm.words import some_of

# Hosts are left out if the run is faster without them by these factors:
LEAVE_OUT = 1.005  # in a plan
CLEARLY = 1.02  # in a run, whose speeds were measured in a second or two
# If rank 0's host would compute nothing: with measured speeds, and with speeds from paces alone. The pace of ranks that
# share cores with others varies a lot.
HAND_OVER, HAND_OVER_UNSEEN = 1.3, 2.0
EVERY_SUBSET = 5  # up to this number of hosts, all subsets are tried
ONE_BY_ONE = 8  # up to this number of hosts, hosts are left out and taken in one by one
FEW = 32  # with more hosts, at first one in FEW hosts is left out

Hosts = frozenset[int]


def search(
    layouts: Layouts, machines: Machines, needed: int = 0, worth: float = 1.0
) -> tuple[Found, list[int]]:
    """Return the fastest layout on these hosts or on some of them, and the hosts that are left out.

    The first `needed` hosts are never left out. All others are left out unless they make the run `worth` times as fast.
    Of about equally fast choices, the one with the most hosts is returned. LayoutError if no layout is possible.
    """
    tried = _tried(layouts, machines, needed)
    without = tried.best(worth)
    return tried.found[without], sorted(without)


def for_run(layouts: Layouts, machines: Machines, worth: float = 1.0) -> tuple[Found, list[int], str]:
    """Return the layout of a run on these machines, the hosts that are left out, and a sentence about those, if any.

    Hosts are left out if speeds are known and the run is clearly faster without them, or if they would have nothing to
    do. Rank 0's host is always used: it reads the input and writes the results. `worth` is that of `search`.
    """
    if not machines.speeds or len(machines.ranks_per_host) == 1:
        return layouts.choose(machines), [], ""
    tried = _tried(layouts, machines, 1)
    without = tried.best(worth)
    best, on_all, left_out = tried.found[without], tried.found.get(frozenset()), sorted(without)
    if on_all is None:
        return best, left_out, _reason(machines, left_out, "there are no more requests")
    times, useless = on_all.cost / best.cost, len(on_all.time.idle) > len(best.time.idle)
    alone = len(best.machines.ranks_per_host) == 1
    clear = times * (worth if alone else 1.0) >= CLEARLY
    if without and (clear or best.fits > on_all.fits or useless):
        them = "it" if len(without) == 1 else "them"
        why = f"the run is {times:.1f} times as fast without {them}"
        if times < CLEARLY:
            why = f"the run is hardly faster with {them}"
        return best, left_out, _reason(machines, left_out, f"by the estimated time of a step {why}")
    return on_all, [], ""


def shards_may_save(layouts: Layouts, machines: Machines) -> float:
    """Return the seconds that shards on several hosts may save beside rank 0's host alone.

    A network that is not known is taken to be twice as good as the assumed one.
    """
    hosts = len(machines.ranks_per_host)
    alone = layouts.choose(machines.without(range(1, hosts))).cost
    hopeful, found = machines, [alone]
    if not machines.links_known:
        hopeful = replace(machines.with_faster_network(2, latency=0.5), linked=True)
    for count in (1 << power for power in range(1, hosts.bit_length())):
        part = hopeful.without(range(count, hosts))
        with suppress(*IMPOSSIBLE):
            found.append(layouts.of_one(part, 1, part.ranks).cost)
    return alone - min(found)


def _tried(layouts: Layouts, machines: Machines, needed: int) -> _Tried:
    """Return the layouts on these machines and without some of their hosts; LayoutError if no layout is possible."""
    hosts, tried = len(machines.ranks_per_host), _Tried(layouts, machines, needed)
    most = hosts
    if needed and layouts.requests and not machines.links_known and not by_rank(layouts.spec):
        # If a host can hold the model, no replica is larger than a host, and that of rank 0 may have nothing to do.
        tried.look(tried.alone)
        if tried.alone in tried.found and tried.found[tried.alone].fits:
            most = min(hosts, layouts.requests + 1)
    refused: LayoutError | None = None
    if most == hosts:
        try:
            tried.add(frozenset())
        except LayoutError as error:
            refused = error
    if hosts > 1 and not by_rank(layouts.spec):
        for without in _candidates(machines, needed):
            if hosts - len(without) <= most:
                tried.look(without)
        if hosts - needed > EVERY_SUBSET and hosts <= ONE_BY_ONE:
            tried.climb()
    if not tried.found:
        assert refused is not None
        raise refused
    return tried


def _reason(machines: Machines, without: Sequence[int], why: str) -> str:
    """Return a sentence that names the hosts that are left out and says why."""
    names = machines.host_names()
    named = some_of([names[host] for host in without], "host")
    return f"{named} {'is' if len(without) == 1 else 'are'} left out and kept in reserve: {why}."


def by_itself(spec: Spec) -> bool:
    """Return whether ranks may be kept in reserve: the job sets no layout, weights' budget, or values by rank.

    A budget for weights is that of each rank, so fewer ranks would hold a smaller part of the model.
    """
    layout = spec.layout
    left_open = (layout.replicas, layout.stages, layout.shards, layout.hosts) == ("auto",) * 4
    return left_open and spec.memory.weights == "all" and not by_rank(spec)


def by_rank(spec: Spec) -> bool:
    """Return whether the job has lists of values by rank number. Without some hosts, ranks would have other numbers."""
    return any(
        isinstance(value, list) for value in (spec.memory.weights, spec.memory.kv, spec.layout.threads)
    )


class _Tried:
    """The layouts that were found without some hosts."""

    def __init__(self, layouts: Layouts, machines: Machines, needed: int) -> None:
        """Begin without a layout; the first `needed` hosts cannot be left out."""
        self._layouts, self._machines, self._needed = layouts, machines, needed
        #: the hosts that are left out if only the needed ones are used
        self.alone: Hosts = frozenset(range(needed, len(machines.ranks_per_host)))
        self.found: dict[Hosts, Found] = {}
        self._alike: dict[tuple[object, ...], Machines] = {}  # the machines that remain, which may be equal

    def add(self, without: Hosts) -> None:
        """Find the layout without these hosts; LayoutError if none is possible."""
        machines = self._machines.without(without) if without else self._machines
        key = (*machines.ranks_per_host, *machines.free, *(speed.key for speed in machines.speeds))
        if key not in self._alike:
            self._alike[key] = machines
            self.found[without] = self._layouts.choose(machines)

    def look(self, without: Hosts) -> None:
        """Find the layout without these hosts, if one is possible."""
        with suppress(*IMPOSSIBLE):
            self.add(without)

    def best(self, worth: float) -> Hosts:
        """Return the hosts to leave out; `worth` is that of `search`."""
        best = self._fastest()
        alone = self.found.get(self.alone) if self._needed else None
        if alone is not None and alone.fits and alone.cost < worth * self.found[best].cost:
            return self.alone
        return best

    def _fastest(self) -> Hosts:
        """Return the hosts to leave out for the fastest run; of about equal choices, that which leaves out fewest."""
        hand_over = HAND_OVER if self._machines.speeds_known else HAND_OVER_UNSEEN

        def cost(found: Found) -> tuple[bool, bool, float]:
            idle = found.time.idle
            waits = any(idle)  # a replica with another number than 0, which is rank 0's, has nothing to do
            return not found.fits, waits, found.cost * (hand_over if 0 in idle else 1.0)

        costs = {without: cost(found) for without, found in self.found.items()}
        *kind, minimum = min(costs.values())
        near = [
            without for without, (*own, each) in costs.items() if own == kind and each <= LEAVE_OUT * minimum
        ]
        return min(
            near, key=lambda without: (bool(self.found[without].time.idle), len(without), sorted(without))
        )

    def climb(self) -> None:
        """From the best choice so far, leave out or take in one host at a time as long as the run gets faster."""
        before: Hosts | None = None
        while self.found and (best := self._fastest()) != before:
            before = best
            for host in sorted(self.alone):
                if len(without := best ^ {host}) < len(self._machines.ranks_per_host):
                    self.look(without)


def _candidates(machines: Machines, needed: int) -> Iterator[Hosts]:
    """Hosts that may be left out: every subset of a few hosts; of many, the worst 1, 2, 4, ... in one respect."""
    hosts = len(machines.ranks_per_host)
    optional = range(needed, hosts)
    if len(optional) <= EVERY_SUBSET:
        for bits in range(1, 1 << len(optional)):
            without = frozenset(host for at, host in enumerate(optional) if bits >> at & 1)
            if len(without) < hosts:
                yield without
        return
    for order in _orders(machines):
        worst = [host for host in order if host >= needed][: hosts - 1]
        count = max(hosts // FEW, 1)
        while count < len(worst):
            yield frozenset(worst[:count])
            count *= 2
        yield frozenset(worst)


def _orders(machines: Machines) -> Iterator[Sequence[int]]:
    """Yield the hosts in several orders, the worst first: by products, by network, by memory, and from the last on."""
    first = machines.firsts()

    def by(worth: Callable[[int], float]) -> list[int]:
        return sorted(range(len(first)), key=lambda host: (worth(first[host]), -host))

    yield machines.slowest_first()
    if machines.speeds:
        yield by(lambda rank: machines.speeds[rank].wire)
        yield by(lambda rank: -machines.speeds[rank].latency)
    yield by(lambda rank: machines.free[rank])
    yield range(len(first) - 1, -1, -1)
