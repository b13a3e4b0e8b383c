"""How long all-reduce and all-gather take, beside MPI's own: run it by hand on a quiet machine.

    mpiexec -n 2 python -m tests.comm.latency

MPI's own gather is awaited as ours is, except "blocking". Its sums are not used: their order is not the fixed tree.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np

from mpillm.comm.collectives import Group
from mpillm.comm.counters import MessageCounters
from mpillm.comm.program import guard
from mpillm.comm.shared import SharedRows, shared_rows
from mpillm.comm.transfer import F32, Wire
from mpillm.comm.world import World
from mpillm.kernels import path
from mpillm.partition.grid import Place

SHAPES = ((1, 576), (1, 2048), (32, 2048))
CALLS = 500
PATIENCE = 1.0  # seconds of a measurement, about
# Seconds that each core computes between two sums, as in a step of a Llama of 10^9 weights in Q4_0 on two cores. Ranks
# that share a core take turns there, and a sum takes what that costs besides.
BETWEEN, ROUNDS = 260e-6, 50


def main(world: World) -> int:
    from mpillm.comm.probe import links  # once `guard` has started MPI

    place, crowded = Place(world.rank, 1, world.size), world.nodes.crowded(range(world.size))
    several = len(set(world.hosts)) > 1
    rate = min(link.bandwidth for link in links(world)) if several else math.inf
    for m, d in SHAPES:
        x = np.ones((m, d), np.float32)
        took = {f"gather by {name}": _microseconds(world, call) for name, call in _gathers(world, x).items()}
        if not world.oversubscribed:  # MPI's own waiting would take the cores from those it waits for
            own = partial(world.comm.Allreduce, x, np.empty_like(x))
            took["sum by MPI's own, blocking"] = _microseconds(world, own)
        shared = shared_rows(world, world, place, x.nbytes)
        ways: list[tuple[str, Wire, SharedRows | None]] = [
            ("f32", "f32", None),
            ("q8_0", "q8_0", None),
            *([("f32 in shared memory", "f32", shared)] if shared else []),
        ]
        for name, wire, memory in ways:
            group = Group(world, place, wire, MessageCounters(), 1, memory, rate, crowded)
            took[f"sum by {name}"] = _microseconds(world, partial(group.all_reduce, np.zeros_like(x)))
            if memory is not None:
                took["the same between computing"] = _between_computing(
                    world, partial(group.all_reduce, np.zeros_like(x))
                )
        if world.rank == 0:
            figures = ", ".join(f"{name} {value:.1f}" for name, value in took.items())
            print(f"{world.size} ranks, {m} x {d}, {path()} kernels, microseconds: {figures}", flush=True)
    return 0


def _gathers(world: World, x: F32) -> dict[str, Callable[[], object]]:
    """Ways to bring f32 [m, d] of each rank to all."""
    group = Group(world, Place(world.rank, 1, world.size), "f32", MessageCounters())
    everyone = np.empty((world.size, *x.shape), np.float32)
    ways: dict[str, Callable[[], object]] = {"messages": partial(group.all_gather, x)}
    ways["MPI's Iallgather"] = lambda: world.wait(world.comm.Iallgather(x, everyone).Test)
    try:
        persistent = world.comm.Allgather_init(x, everyone)
    except NotImplementedError:  # MPI before 4.0
        return ways

    def exchange() -> None:
        persistent.Start()
        world.wait(persistent.Test)

    return {**ways, "MPI's Allgather_init": exchange}


def _microseconds(world: World, call: Callable[[], object]) -> float:
    """The median on the slowest rank."""
    began = time.perf_counter()
    call()
    calls = int(min(CALLS, max(3.0, PATIENCE / min(world.gather(time.perf_counter() - began)))))
    for _ in range(calls // 10):
        call()
    world.barrier()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * max(world.gather(median(times)))


def _between_computing(world: World, call: Callable[[], object]) -> float:
    """How much longer a round of computing and a call takes than the computing: the median on the slowest rank."""
    nodes, times = world.nodes, list[float]()
    own = BETWEEN * min(nodes.cores_here / nodes.ranks_here, 1.0)
    for _ in range(CALLS // ROUNDS):
        start = time.perf_counter()
        for _ in range(ROUNDS):
            until = time.thread_time() + own
            while time.thread_time() < until:
                pass
            call()
        times.append((time.perf_counter() - start) / ROUNDS)
    return 1e6 * (max(world.gather(median(times))) - BETWEEN)


if __name__ == "__main__":
    sys.exit(guard(main))
