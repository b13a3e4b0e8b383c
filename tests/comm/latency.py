"""How long an all-reduce takes, beside MPI's own exchange: run it by hand on a quiet machine.

mpiexec -n 2 python tests/comm/latency.py
"""

from __future__ import annotations

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
from mpillm.comm.transfer import Wire
from mpillm.comm.world import World
from mpillm.kernels import path
from mpillm.partition.grid import Place

SHAPES = ((1, 576), (32, 2048))
CALLS = 500


def main(world: World) -> int:
    def microseconds(call: Callable[[], object]) -> float:
        for _ in range(CALLS // 10):
            call()
        world.barrier()
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 1e6 * median(times)

    place = Place(world.rank, 1, world.size)
    for m, d in SHAPES:
        x = np.ones((m, d), np.float32)
        total = np.empty_like(x)
        took = {}
        if not world.oversubscribed:  # MPI's own waiting would take the cores from those it waits for
            took["MPI's own"] = microseconds(partial(world.comm.Allreduce, x, total))
        shared = shared_rows(world, place, x.nbytes)
        ways: list[tuple[str, Wire, SharedRows | None]] = [
            ("f32", "f32", None),
            ("q8_0", "q8_0", None),
            *([("f32 in shared memory", "f32", shared)] if shared else []),
        ]
        for name, wire, memory in ways:
            group = Group(world, place, wire, MessageCounters(), shared=memory)
            took[name] = microseconds(partial(group.all_reduce, np.zeros_like(x)))
        if world.rank == 0:
            figures = ", ".join(f"{name} {value:.1f}" for name, value in took.items())
            print(f"{world.size} ranks, {m} x {d}, {path()} kernels, microseconds: {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
