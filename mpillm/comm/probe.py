"""Find which MPI this is, and measure how fast messages go between ranks, for `mpillm doctor`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpillm.comm.launch import Library, loaded_library_path
from mpillm.comm.world import World

# Bytes of a message that shows latency, and of those that show bandwidth: MIDDLE ones if one takes more than SLOW of
# the seconds of a timing there and back, else LARGE ones. If the effort is less than 1, both are a quarter as large.
SMALL, MIDDLE, LARGE, SLOW = 4, 2**16, 2**20, 0.1
SMALL_ROUNDS, LARGE_ROUNDS = 100, 5
PATIENCE = 0.1  # seconds of a timing
PARTNERS = 8  # with which each host is measured, at most
_TAG = 99
_END = np.ones(1, np.uint8)  # what is timed is zeros


@dataclass(frozen=True)
class LinkTiming:
    """The medians of round trips between two ranks."""

    ranks: tuple[int, int]
    latency: float  # seconds one way
    bandwidth: float  # bytes per second


def mpi_library() -> Library:
    """Return the MPI library of this rank."""
    return Library(*MPI.get_vendor(), MPI.Get_library_version(), loaded_library_path())


def links(world: World, effort: float = 1.0) -> list[LinkTiming]:
    """Return the timings of all pairs of hosts, by their first ranks; on one host of its first two ranks (collective).

    Each timing takes up to `effort` times PATIENCE, but at least two round trips.
    """
    numbers = world.nodes.numbers
    firsts = [numbers.index(number) for number in range(max(numbers) + 1)]
    if len(firsts) == 1:
        firsts = list(range(min(world.size, 2)))
    found = []
    for pairs in tournament(len(firsts))[:PARTNERS]:
        world.barrier()
        for first, second in pairs:
            ranks = firsts[first], firsts[second]
            if world.rank == ranks[0]:
                found.append(LinkTiming(ranks, *_time_link(world, ranks[1], effort)))
            elif world.rank == ranks[1]:
                _echo(world, ranks[0])
    return [link for own in world.gather(found) for link in own]


def tournament(players: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs: each member meets every other once, and one a round (the circle method)."""
    circle = [*range(players), *([-1] if players % 2 else [])]  # -1: who is paired with it has a break
    rounds = []
    for _ in range(len(circle) - 1):
        pairs = [(circle[at], circle[-1 - at]) for at in range(len(circle) // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if min(pair) >= 0])
        circle[1:] = [circle[-1], *circle[1:-1]]
    return rounds


def _time_link(world: World, other: int, effort: float = 1.0) -> tuple[float, float]:
    """Return the latency in seconds and the bandwidth in bytes/s to a rank that calls `_echo`."""
    patience, part = effort * PATIENCE, 1 if effort >= 1 else 4
    small = _round_trip(world, other, SMALL, SMALL_ROUNDS // part, patience)
    nbytes, large = MIDDLE // part, _round_trip(world, other, MIDDLE // part, 1, patience)
    if large <= SLOW * patience:  # else once is enough, and all ranks wait for it
        nbytes, large = LARGE // part, _round_trip(world, other, LARGE // part, LARGE_ROUNDS, patience)
    _wait(world, world.comm.Isend([_END, MPI.BYTE], other, _TAG))
    return small / 2, 2 * nbytes / max(large - small, large / 2)


def _round_trip(world: World, other: int, nbytes: int, rounds: int, patience: float) -> float:
    """Return the median seconds of a round trip, without the first one; measures for `patience` seconds."""
    data, back, times = np.zeros(nbytes, np.uint8), np.empty(nbytes, np.uint8), list[float]()
    began = time.perf_counter()
    while len(times) < 2 or (len(times) <= rounds and time.perf_counter() - began < patience):
        start = time.perf_counter()
        _wait(world, world.comm.Isend([data, MPI.BYTE], other, _TAG))
        _wait(world, world.comm.Irecv([back, MPI.BYTE], other, _TAG))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _echo(world: World, other: int) -> None:
    """Send back each message of `_time_link` until it says that it has ended."""
    data, status = np.zeros(LARGE, np.uint8), MPI.Status()
    while True:
        _wait(world, world.comm.Irecv([data, MPI.BYTE], other, _TAG), status)
        if data[0] == _END[0]:
            return
        _wait(world, world.comm.Isend([data[: status.Get_count(MPI.BYTE)], MPI.BYTE], other, _TAG))


def _wait(world: World, request: MPI.Request, status: MPI.Status | None = None) -> None:
    world.wait(lambda: request.Test(status))
