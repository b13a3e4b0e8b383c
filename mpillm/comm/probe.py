"""Which MPI this is and how fast messages go between ranks, for `mpillm doctor`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from mpillm.comm.launch import Library, loaded_library_path
from mpillm.comm.world import World

SMALL, LARGE = 4, 4 * 2**20  # bytes of a message that shows latency, and of one that shows bandwidth
SMALL_ROUNDS, LARGE_ROUNDS = 200, 5
_TAG = 99


@dataclass(frozen=True)
class Link:
    """Between rank 0 and another rank; medians of round trips."""

    rank: int
    latency: float  # seconds one way
    bandwidth: float  # bytes per second


def mpi_library() -> Library:
    """The MPI library of this rank."""
    return Library(*MPI.get_vendor(), MPI.Get_library_version(), loaded_library_path())


def links(world: World) -> list[Link]:
    """Collective: what rank 0 measured with each other rank in turn; empty on the others."""
    found = []
    for rank in range(1, world.size):
        world.barrier()
        if world.rank in (0, rank):
            other = rank if world.rank == 0 else 0
            small = _round_trip(world, other, SMALL, SMALL_ROUNDS)
            large = _round_trip(world, other, LARGE, LARGE_ROUNDS)
            if world.rank == 0:
                found.append(Link(rank, small / 2, 2 * LARGE / large))
    world.barrier()
    return found


def _round_trip(world: World, other: int, nbytes: int, rounds: int) -> float:
    """Median seconds of a message there and back; both ranks call it."""
    data, back, times = np.zeros(nbytes, np.uint8), np.empty(nbytes, np.uint8), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        if world.rank < other:
            _wait(world, world.comm.Isend([data, MPI.BYTE], other, _TAG))
            _wait(world, world.comm.Irecv([back, MPI.BYTE], other, _TAG))
        else:
            _wait(world, world.comm.Irecv([back, MPI.BYTE], other, _TAG))
            _wait(world, world.comm.Isend([data, MPI.BYTE], other, _TAG))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(world: World, request: MPI.Request) -> None:
    world.wait(request.Test)
