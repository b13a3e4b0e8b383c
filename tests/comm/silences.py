"""Program for test_deadline.py: `silences.py NAME` shows a rank that says nothing for longer than the deadline."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

from mpillm.comm.program import guard
from mpillm.comm.world import World


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
    with world.computing():
        while world.rank == 1 and time.monotonic() < until:
            sum(range(10_000))
        world.barrier()
    return 0


def hangs(world: World) -> int:
    """A rank reads from a pipe into which nobody writes; its other threads are well."""
    with world.computing():
        if world.rank == int(os.environ["VICTIM"]):
            os.mkfifo(sys.argv[2])
            open(sys.argv[2], "rb").close()
        world.barrier()
    return 0


def waits_for_a_disk(world: World) -> int:
    """A rank is in an uninterruptible sleep, as one that reads from a disk; others wait for it."""
    with world.computing():
        if world.rank == 1:
            os.mkfifo(sys.argv[2])
            threading.Timer(float(os.environ["SECONDS"]), lambda: open(sys.argv[2], "wb").close()).start()
            sleep_uninterruptibly(sys.argv[2])
        world.barrier()
    return 0


def sleep_uninterruptibly(fifo: str) -> None:
    """Until somebody writes into it: whoever spawns a process sleeps so until that one has opened its files."""
    libc, actions, pid = ctypes.CDLL(None), ctypes.create_string_buffer(512), ctypes.c_int()
    libc.posix_spawn_file_actions_init(actions)
    libc.posix_spawn_file_actions_addopen(actions, 0, fifo.encode(), os.O_RDONLY, 0)
    words = (ctypes.c_char_p * 2)(b"true", None)
    assert libc.posix_spawnp(ctypes.byref(pid), words[0], actions, None, words, None) == 0
    os.waitpid(pid.value, 0)


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
