"""Program for test_world.py: `endings.py NAME` shows one way in which a world begins, waits or ends."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from mpillm import version
from mpillm.comm import core_speed
from mpillm.comm.launch import launched_by
from mpillm.comm.program import guard
from mpillm.comm.world import World
from mpillm.errors import JobError, ModelError


def blocked(world: World) -> int:
    """Wait for messages that never come."""
    from mpillm.comm.channel import Channel
    from mpillm.comm.counters import MessageCounters

    Channel(world, MessageCounters()).take()
    return 0


def fine(world: World) -> int:
    """Ends well; rank 0 alone has something to say about some requests."""
    print(f"alive {world.rank} of {world.size}\n", end="", flush=True)
    return 1 if world.rank == 0 else 0


def other_version(world: World) -> int:
    """Is not called: rank 1 says that it has another version."""
    raise AssertionError


def bug_at_start(world: World) -> int:
    """Is not called: the last rank fails while the ranks tell each other who they are."""
    raise AssertionError


def all_refuse(world: World) -> int:
    raise JobError("There is no such job.")


def under_way(world: World) -> int:
    """All fail alike while large messages are under way that nobody will take."""
    from mpillm.comm.channel import Channel
    from mpillm.comm.counters import MessageCounters

    channel = Channel(world, MessageCounters())
    if world.rank == 0:
        channel.post(bytes(50_000_000))
    raise JobError("There is no such job.")


def all_bug(world: World) -> int:
    raise ValueError("boom")


def bug_on_one(world: World) -> int:
    if world.rank == 1:
        raise ValueError("boom")
    return blocked(world)


def error_on_one(world: World) -> int:
    if world.rank == 1:
        raise ModelError("This machine's model file is broken.")
    return blocked(world)


def agreed(world: World) -> int:
    with world.together():
        pass
    with world.together():
        if world.rank > 0:
            raise ModelError(f"Rank {world.rank} cannot read the model.")
    return 0


def terminated(world: World) -> int:
    """All ranks get SIGTERM while they wait, as from a job system."""
    return signalled(world, signal.SIGTERM)


def warned(world: World) -> int:
    """The same with the signal that Slurm is asked to send ahead of the time limit."""
    return signalled(world, signal.SIGUSR1)


def signalled(world: World, number: signal.Signals) -> int:
    pids = world.gather(os.getpid())
    if world.rank == 0:
        time.sleep(0.2)
        for pid in reversed(pids):
            os.kill(pid, number)
        time.sleep(30)
    return blocked(world)


def lost_at_last(world: World) -> int:
    """Two spare ranks have told that they leave, and one dies; the other one notices it before rank 0 leaves."""
    from mpillm.comm.faults import RankLost

    if not world.go_on_with([0]):
        world.depart(0, failed=False)
        if world.rank == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            with world.losses():
                world.stand_by()
        except RankLost:
            world.shrink()
    time.sleep(2)
    return 0


def out_of_step(world: World) -> int:
    from mpillm.comm.channel import Pipe
    from mpillm.comm.counters import MessageCounters
    from mpillm.partition.grid import Place

    pipe = Pipe(world, Place(world.rank, world.size, 1), "f32", MessageCounters())
    if world.rank == 0:
        pipe.send(np.zeros((2, 8), np.float32))
    elif world.rank == 1:
        pipe.recv(int(os.environ["ROWS"]), 8)
    return blocked(world)


def waiting(world: World) -> int:
    """Rank 0 computes, the others wait for it: how much of a core do they take?"""
    from mpillm.comm.channel import Channel
    from mpillm.comm.counters import MessageCounters

    counters = MessageCounters()
    channel = Channel(world, counters)
    seconds = float(os.environ["SECONDS"])
    world.barrier()
    before = time.process_time()
    if world.rank == 0:
        while time.process_time() - before < seconds:
            pass
        channel.post(b"go")
    else:
        channel.take()
        assert counters.step.seconds > 0.8 * seconds
        print(
            f"burnt {(time.process_time() - before) / counters.step.seconds:.4f} of it\n", end="", flush=True
        )
    return 0


def threads(world: World) -> int:
    chosen = world.threads(os.environ.get("ASKED", "auto"))
    world.limit_threads(chosen)
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    print(f"{chosen} {policy} {world.nodes.ranks_here} {world.nodes.cores_here}\n", end="", flush=True)
    print(*world.nodes.bindings, sep="\n", end="", flush=True)
    return 0


def boom() -> float:
    raise ValueError("boom")


if __name__ == "__main__":
    started = launched_by(os.environ)
    if sys.argv[1] == "other_version" and started and started.rank == 1:
        version.with_sources = lambda: "0.0.9"
    if sys.argv[1] == "bug_at_start" and (not started or started.rank == started.size - 1):
        core_speed.pace = boom
    sys.exit(guard(globals()[sys.argv[1]]))
