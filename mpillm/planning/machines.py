"""The machines of the ranks: their memory and their speed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mpillm.comm.cores import reserve_in_words, with_cores
from mpillm.planning.speed import ASSUMED, Speed
from mpillm.planning.stage_time import INSIDE, LinkRate, between
from mpillm.words import some_of


@dataclass(frozen=True)
class Machines:
    """The hosts of the ranks: how many ranks in a row are on each host, and the free bytes of each rank.

    If they are known, there are also the name of each rank's host and each rank's speed.
    """

    ranks_per_host: Sequence[int]
    free: Sequence[int]
    names: Sequence[str] = field(default=(), compare=False)
    speeds: Sequence[Speed] = field(default=(), compare=False)
    measured: bool = field(default=False, compare=False)  # all speeds were measured
    # Speeds come from `pace` alone, without the links unless those were measured (`linked`).
    glimpsed: bool = field(default=False, compare=False)
    linked: bool = field(default=False, compare=False)
    # Each rank's machine, and the part of the machine's cores that the rank keeps busy. Several hosts, such as
    # containers, may share a machine. `speeds` are those while all ranks work.
    loads: Sequence[tuple[str, float]] = field(default=(), compare=False)

    cores: Sequence[int] = field(default=(), compare=False)  # the cores of each host (0: unknown), or empty

    @property
    def several_hosts(self) -> bool:
        """Whether messages between ranks go over a network."""
        return len(self.ranks_per_host) > 1

    @property
    def speeds_known(self) -> bool:
        """Whether more is known of the speeds of ranks than their paces."""
        return bool(self.speeds) and not self.glimpsed

    @property
    def links_known(self) -> bool:
        """Whether the speeds of the network are known, with some speeds of the ranks."""
        return self.speeds_known or self.linked

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return len(self.free)

    @cached_property
    def host_of_rank(self) -> list[int]:
        """The number of each rank's host."""
        return [host for host, count in enumerate(self.ranks_per_host) for _ in range(count)]

    def speed_of(self, rank: int) -> Speed:
        """Return the speed of a rank; if no speeds are known, its part of the assumed speed of its host."""
        if self.speeds:
            return self.speeds[rank]
        return ASSUMED.shared_by(self.ranks_per_host[self.host_of_rank[rank]])

    def link(self, ranks: Sequence[int]) -> LinkRate:
        """Return the slowest link between these ranks."""
        hosts = self.host_of_rank
        if len({hosts[rank] for rank in ranks}) == 1:
            return INSIDE
        return between([self.speed_of(rank) for rank in ranks])

    @cached_property
    def crowding(self) -> dict[str, float]:
        """For each machine, the number of busy threads that share a core if all ranks work, at least 1."""
        return _crowding(self.loads)

    def crowded(self, ranks: Sequence[int]) -> bool:
        """Return whether a machine of these ranks has fewer cores than busy threads if all ranks work."""
        return bool(self.loads) and any(self.crowding[self.loads[rank][0]] > 1 for rank in ranks)

    def alone(self, ranks: Sequence[int], others: Sequence[tuple[int, float]]) -> float:
        """Return how many times as fast these ranks are if `others` work only a part of the time, and no more ranks do.

        The slowest of them counts. `speeds` are those while all ranks work.
        """
        if not self.crowded(ranks):
            return 1.0
        loads = [self.loads[rank] for rank in ranks]
        loads += [(machine, part * load) for rank, part in others for machine, load in [self.loads[rank]]]
        now = _crowding(loads)
        return min(self.crowding[machine] / now[machine] for machine, _ in loads[: len(ranks)])

    def while_idle(self, idle: Collection[int]) -> Machines:
        """Return these machines while the ranks of `idle` do nothing, and leave their cores to the others."""
        if not self.loads:
            return self
        loads = [(machine, 0.0 if rank in idle else part) for rank, (machine, part) in enumerate(self.loads)]
        return replace(self, speeds=self._speeds_of(range(self.ranks), loads), loads=loads)

    def firsts(self) -> list[int]:
        """Return the first rank of each host."""
        return list(itertools.accumulate(self.ranks_per_host, initial=0))[:-1]

    def host_names(self) -> list[str]:
        """Return the name of each host."""
        return [
            self.names[first] if self.names else f"host {number + 1}"
            for number, first in enumerate(self.firsts())
        ]

    def slowest_first(self) -> list[int]:
        """Return the hosts, the slowest first; of equally fast ones, the last host comes first."""
        rates = [
            max(self.speeds[first].products.values(), key=max)[-1] * count if self.speeds else 0.0
            for first, count in zip(self.firsts(), self.ranks_per_host, strict=True)
        ]
        return sorted(range(len(rates)), key=lambda host: (rates[host], -host))

    def computing(self, threads: object) -> tuple[Machines, list[str]]:
        """These machines without the ranks that an automatic layout keeps in reserve, and sentences about those.

        Ranks without a core are kept in reserve: see `with_cores`, also for `threads`.
        """
        ranks, parts, said = list[int](), list[tuple[int, int]](), dict[str, list[str]]()
        names = self.host_names()
        for host, first in enumerate(self.firsts()):
            count = self.ranks_per_host[host]
            cores = self.cores[host] if self.cores else 0
            used = with_cores(count, cores, threads != "auto") if cores else count
            ranks += range(first, first + used)
            parts += [(used, count)] * used
            if used < count:
                said.setdefault(reserve_in_words(count, cores, used), []).append(names[host])
        if not said:
            return replace(self, cores=()), []
        found, alike = replace(self, loads=()).of_ranks(ranks), dict[tuple[int, int, int], Speed]()
        speeds = []
        for speed, (used, count) in zip(found.speeds, parts, strict=bool(found.speeds)):
            # The ranks that compute share the quota of their host.
            own = replace(speed.shared_by(used / count), part=min(speed.part * count / used, 1.0))
            speeds.append(alike.setdefault((id(speed), used, count), own))
        free = [
            min(own * count // used, sys.maxsize)
            for own, (used, count) in zip(found.free, parts, strict=True)
        ]
        sentences = [f"on {some_of(hosts, 'host')}, {text}" for text, hosts in said.items()]
        return replace(found, free=free, speeds=speeds, cores=()), sentences

    def without(self, hosts: Collection[int]) -> Machines:
        """These machines without some hosts."""
        return self.of_ranks([rank for rank, host in enumerate(self.host_of_rank) if host not in hosts])

    def of_ranks(self, ranks: Sequence[int]) -> Machines:
        """Return the machines of some of the ranks."""
        hosts = self.host_of_rank
        loads = [self.loads[rank] for rank in ranks] if self.loads else ()
        return replace(
            self,
            ranks_per_host=[len(list(run)) for _, run in itertools.groupby(hosts[rank] for rank in ranks)],
            free=[self.free[rank] for rank in ranks],
            names=[self.names[rank] for rank in ranks] if self.names else (),
            speeds=self._speeds_of(ranks, loads) if self.speeds else (),
            loads=loads,
        )

    def _speeds_of(self, ranks: Sequence[int], loads: Sequence[tuple[str, float]]) -> list[Speed]:
        """Return the speeds of some of the ranks if the others leave them their cores; equal speeds are one object."""
        before, now = self.crowding, _crowding(loads)
        eased, found = dict[tuple[int, float], Speed](), list[Speed]()
        for rank in ranks:
            speed = self.speeds[rank]
            times = now[machine] / before[machine] if loads and (machine := self.loads[rank][0]) else 1.0
            key = id(speed), times
            found.append(eased.setdefault(key, speed if times == 1 else speed.slowed(times)))
        return found

    def with_another(self) -> Machines:
        """These machines and one more host like the last one, with one rank."""
        ranks = self.ranks_per_host[-1]
        return replace(
            self,
            ranks_per_host=[*self.ranks_per_host, 1],
            free=[*self.free, min(self.free[-1] * ranks, sys.maxsize)],
            names=[*self.names, *self.names[-1:]],
            speeds=[*self.speeds, *(speed.shared_by(1 / ranks) for speed in self.speeds[-1:])],
            loads=[*self.loads, *(("another", part) for _, part in self.loads[-1:])],
        )

    def with_faster_network(self, times: float, latency: float = 1.0) -> Machines:
        """These machines with links that have `times` times their bandwidth and `latency` times their latency."""
        # Equal speeds stay one object.
        faster = {
            id(speed): replace(speed, wire=times * speed.wire, latency=latency * speed.latency)
            for speed in self.speeds
        }
        return replace(self, speeds=[faster[id(speed)] for speed in self.speeds])


def _crowding(loads: Sequence[tuple[str, float]]) -> dict[str, float]:
    """For each machine, the number of busy threads that share a core, at least 1."""
    busy = dict.fromkeys((machine for machine, _ in loads), 0.0)
    for machine, part in loads:
        busy[machine] += part
    return {machine: max(threads, 1.0) for machine, threads in busy.items()}
