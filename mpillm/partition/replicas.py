"""Replicas: ranks = replicas x stages x shards. Each replica is a whole copy of the model on ranks of its own.

A replica's ranks are neighbours in rank order, and the first of them leads it. Replicas may have different numbers of
stages, which changes no result. They have the same number of shards, because the last digits of results may depend on
that.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mpillm.errors import LayoutError
from mpillm.partition import grid
from mpillm.partition.grid import Auto, Divisible, Place


@dataclass(frozen=True)
class Replica:
    """A replica whose leader is the world's rank `first`; `layers` is that of `Place`."""

    first: int
    stages: int
    shards: int
    layers: tuple[int, ...] = ()

    @property
    def ranks(self) -> range:
        """The replica's ranks in the world."""
        return range(self.first, self.first + self.stages * self.shards)

    @property
    def stage_ranks(self) -> list[range]:
        """The ranks of each stage in the world."""
        return [self.ranks[at : at + self.shards] for at in range(0, len(self.ranks), self.shards)]

    @property
    def places(self) -> list[Place]:
        """The places of its ranks, in rank order."""
        return [
            Place(number, self.stages, self.shards, self.first, self.layers)
            for number in range(len(self.ranks))
        ]


Replicas = tuple[Replica, ...]


def choose(
    model: Divisible,
    ranks: int,
    count: int,
    stages: int | Auto = "auto",
    shards: int | Auto = "auto",
    ranks_per_host: Sequence[int] | None = None,
) -> Replicas:
    """Lay `count` replicas out on all of `ranks` ranks, or say why not (LayoutError).

    `stages` and `shards` are those of each replica. The ranks are divided as evenly as possible, at borders between
    hosts if there are enough hosts; `ranks_per_host` is that of `grid.choose`.
    """
    sizes = _sizes(ranks, count, ranks_per_host)
    hosts = _hosts_of_parts(sizes, ranks_per_host)
    if shards == "auto" and count > 1:
        shards = _common_shards(model, sizes, stages, hosts)
    return _in_a_row(
        [grid.choose(model, size, stages, shards, within) for size, within in zip(sizes, hosts, strict=True)]
    )


def choose_fewer(
    model: Divisible,
    ranks: int,
    before: Replicas,
    same_shards: bool,
    same_stages: bool,
    ranks_per_host: Sequence[int] | None = None,
) -> Replicas:
    """Lay out as many of the replicas `before` as possible on the `ranks` ranks that are left; some may be left over.

    `same_shards` says that results depend on the number of shards, `same_stages` that they depend on that of stages.
    """
    smallest = min(len(replica.ranks) for replica in before)
    for count in range(min(len(before), max(ranks // smallest, 1)), 0, -1):
        sizes = _sizes(ranks, count, ranks_per_host)
        layouts = [
            grid.choose_fewer(model, size, before[0].shards, same_shards, within)
            for size, within in zip(sizes, _hosts_of_parts(sizes, ranks_per_host), strict=True)
        ]
        alike = len({found for _, found in layouts}) == 1 or not same_shards
        if count == 1 or (alike and (len({found for found, _ in layouts}) == 1 or not same_stages)):
            return _in_a_row(layouts)
    raise AssertionError("one replica can always be laid out")


def _in_a_row(layouts: Sequence[tuple[int, int]]) -> Replicas:
    firsts = itertools.accumulate((stages * shards for stages, shards in layouts), initial=0)
    return tuple(Replica(first, *layout) for first, layout in zip(firsts, layouts, strict=False))


def _sizes(ranks: int, count: int, ranks_per_host: Sequence[int] | None) -> list[int]:
    """Return the number of ranks of each of `count` replicas."""
    if count > ranks:
        raise LayoutError(
            f"layout.replicas = {count} needs at least {count} ranks, and there are {ranks}; "
            "start more ranks, or lower it."
        )
    borders = list(itertools.accumulate(ranks_per_host or ()))
    if len(borders) < count:
        borders = list(range(1, ranks + 1))
    found = [0]
    for number in range(1, count):
        # Each replica behind this one needs a border too. The nearest one is the last below the ideal, or the next.
        first, end = bisect.bisect_right(borders, found[-1]), len(borders) - count + number
        at = min(max(bisect.bisect_right(borders, number * ranks // count), first + 1), end - 1)
        allowed = borders[at - 1 : at + 1] if at > first else borders[first : first + 1]
        found.append(min(allowed, key=lambda border: (abs(border * count - number * ranks), -border)))
    found.append(ranks)
    return [end - begin for begin, end in itertools.pairwise(found)]


def _hosts_of_parts(sizes: Sequence[int], ranks_per_host: Sequence[int] | None) -> list[Sequence[int] | None]:
    """For each part of the ranks, given by its size, how many ranks in a row are on one host."""
    if ranks_per_host is None:
        return [None] * len(sizes)
    host_of_rank = [host for host, count in enumerate(ranks_per_host) for _ in range(count)]
    firsts = itertools.accumulate(sizes, initial=0)
    return [
        [len(list(run)) for _, run in itertools.groupby(host_of_rank[first : first + size])]
        for first, size in zip(firsts, sizes, strict=False)
    ]


def _common_shards(
    model: Divisible, sizes: Sequence[int], stages: int | Auto, hosts: Sequence[Sequence[int] | None]
) -> int | Auto:
    """Return the maximum of shards that all replicas can have; if possible, no group of shards spans two hosts."""
    works = [
        {shards for found, shards in grid.layouts(model, size) if stages in ("auto", found)} for size in sizes
    ]
    common = sorted(set.intersection(*works), reverse=True)
    within = [
        shards
        for shards in common
        if not any(grid.crosses_hosts(shards, ranks_per_host) for ranks_per_host in hosts)
    ]
    found = within or common
    return found[0] if found else "auto"  # then `grid.choose` says what would work
