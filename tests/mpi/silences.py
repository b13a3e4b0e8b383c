"""Program for test_deadline.py: `silences.py NAME` shows a rank that says nothing for longer than the deadline."""

from __future__ import annotations

import os
import signal
import sys
import time

from mpillm.comm.world import World, guard


def stopped(world: World) -> int:
    """A rank is stopped, as by a machine that dies: it neither computes nor answers."""
    if world.rank == int(os.environ["VICTIM"]):
        os.kill(os.getpid(), signal.SIGSTOP)
    world.barrier()
    return 0


def gone(world: World) -> int:
    """A rank waits; the test kills what it likes."""
    print(f"pid {os.getpid()}\n", end="", flush=True)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.barrier()
    return 0


def busy(world: World) -> int:
    """A rank computes for long and makes no call of MPI meanwhile; others wait for it."""
    until = time.monotonic() + float(os.environ["SECONDS"])
    while world.rank == 1 and time.monotonic() < until:
        sum(range(10_000))
    world.barrier()
    return 0


def never(_world: World) -> int:
    raise AssertionError("the ranks cannot have met")


STARTING = {
    "stopped_while_starting": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "killed_while_starting": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "asleep_while_starting": lambda: time.sleep(60),
}

if __name__ == "__main__":
    name = sys.argv[1]
    launched = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")
    if name in STARTING and launched == "1":
        time.sleep(float(os.environ.get("WHEN", "0")))
        STARTING[name]()
    sys.exit(guard(globals().get(name, never)))
