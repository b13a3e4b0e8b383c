"""Which MPI this is and how fast messages go between ranks, for `mpillm doctor`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpillm.comm.launch import Library, loaded_library_path
from mpillm.comm.world import World

SMALL, LARGE = 4, 2**19  # bytes of a message that shows latency, and of one that shows bandwidth
SMALL_ROUNDS, LARGE_ROUNDS = 100, 5
PATIENCE = 0.1  # seconds after which a slow link is measured no more
PARTNERS = 8  # with which each host is measured, at most
_TAG = 99


@dataclass(frozen=True)
class LinkTiming:
    """Between two ranks; medians of round trips."""

    ranks: tuple[int, int]
    latency: float  # seconds one way
    bandwidth: float  # bytes per second


def mpi_library() -> Library:
    """The MPI library of this rank."""
    return Library(*MPI.get_vendor(), MPI.Get_library_version(), loaded_library_path())


def links(world: World) -> list[LinkTiming]:
    """Collective: what the first ranks of hosts measured with each other; on one host the first two ranks."""
    numbers = world.nodes.numbers
    firsts = [numbers.index(number) for number in range(max(numbers) + 1)]
    if len(firsts) == 1:
        firsts = list(range(min(world.size, 2)))
    found = []
    for pairs in tournament(len(firsts))[:PARTNERS]:
        world.barrier()
        for first, second in pairs:
            ranks = firsts[first], firsts[second]
            if world.rank in ranks:
                small = _round_trip(world, ranks, SMALL, SMALL_ROUNDS)
                large = _round_trip(world, ranks, LARGE, LARGE_ROUNDS)
                if world.rank == ranks[0]:
                    found.append(LinkTiming(ranks, small / 2, 2 * LARGE / large))
    return [link for own in world.gather(found) for link in own]


def tournament(players: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs in which everyone meets everyone else once, and nobody twice in a round (the circle method)."""
    circle = [*range(players), *([-1] if players % 2 else [])]  # -1: who is paired with it has a break
    rounds = []
    for _ in range(len(circle) - 1):
        pairs = [(circle[at], circle[-1 - at]) for at in range(len(circle) // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if min(pair) >= 0])
        circle[1:] = [circle[-1], *circle[1:-1]]
    return rounds


def _round_trip(world: World, ranks: tuple[int, int], nbytes: int, rounds: int) -> float:
    """Median seconds of a message there and back, without the first; both ranks call it."""
    data, back, times = np.zeros(nbytes, np.uint8), np.empty(nbytes, np.uint8), list[float]()
    first, began = world.rank == ranks[0], time.perf_counter()
    other = ranks[1] if first else ranks[0]
    while not data[0]:  # the first rank says which round is the last
        start = time.perf_counter()
        if first:
            data[0] = len(times) == rounds or start - began > PATIENCE
            _wait(world, world.comm.Isend([data, MPI.BYTE], other, _TAG))
            _wait(world, world.comm.Irecv([back, MPI.BYTE], other, _TAG))
        else:
            _wait(world, world.comm.Irecv([back, MPI.BYTE], other, _TAG))
            data[0] = back[0]
            _wait(world, world.comm.Isend([data, MPI.BYTE], other, _TAG))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(world: World, request: MPI.Request) -> None:
    world.wait(request.Test)
