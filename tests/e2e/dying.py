"""Program for test_lost_ranks.py: `dying.py PLAN ARGUMENTS...` is mpillm with ranks that die at points of the plan.

A plan is `RANK:POINT:COUNT:SIGNAL,...`: the rank gets the signal when it comes to the point for the COUNTth time;
`HANG` instead of a signal lets it do nothing any more, and `SLOW` has each call from then on take 50 ms more. `FAIL`
raises an error there, and `LATE` waits for the file MPILLM_TEST_LATE. Of several items for a point the last is first.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from mpillm.cli import main
from mpillm.comm.departure import Departure
from mpillm.comm.world import World
from mpillm.errors import ModelError


def die(point: str, owner: Any, method: str) -> None:
    """Have this rank die, if the plan says so, when `owner.method` is called."""
    for rank, at, count, number in (item.split(":") for item in sys.argv[1].split(",")):
        if at == point and rank == os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")):
            setattr(owner, method, _dying(getattr(owner, method), int(count), number))


def _dying(original: Callable[..., Any], count: int, number: str) -> Callable[..., Any]:
    left = count

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left <= 0 and number == "SLOW":
            time.sleep(0.05)
        elif left == 0 and number == "HANG":
            threading.Event().wait()
        elif left == 0 and number == "FAIL":
            raise ModelError("The model is gone.")
        elif left == 0 and number == "LATE":
            while not os.path.exists(os.environ["MPILLM_TEST_LATE"]):
                time.sleep(0.01)
        elif left == 0:
            os.kill(os.getpid(), signal.Signals[number])
        return original(*args, **kwargs)

    return dying


def run(world: World, *args: Any) -> Any:
    """What computes is loaded only when the program's threads are known."""
    from mpillm.comm import parts
    from mpillm.comm.collectives import Group
    from mpillm.engine.worker import Worker
    from mpillm.run import assistant, outcome, session, sharing
    from mpillm.run.context import RankContext
    from mpillm.run.dispatch import Dispatcher
    from mpillm.run.leader import Leader

    World.limit_threads = threads  # type: ignore[method-assign] # each point is watched once
    # Whoever goes on keeps its tokenizer: with a second one it would take more memory than planned.
    load, loaded = session.load_tokenizer, weakref.WeakSet[Any]()

    def load_once(*args: Any) -> Any:
        gc.collect()
        assert not loaded, "this rank has a tokenizer"
        tokenizer = load(*args)
        if tokenizer is not None:  # some models have none
            loaded.add(tokenizer)
        return tokenizer

    session.load_tokenizer = load_once
    if {"give", "get"} & set(sys.argv[1].split(":")):  # the second replica gives all back when it has begun

        def targets(self: sharing.Sharing, held: Sequence[int], waiting: int) -> list[int] | None:
            begun = 1 in self._last and self._last[1].steps > 2
            return [sum(held) + waiting, 0] if begun and held[1] else None

        sharing.Sharing.targets = targets  # type: ignore[method-assign]
        sharing.LOOK, assistant.TELL_EVERY = 0.0, 0.1
    if ":sum:" in sys.argv[1]:  # lanes for any rows, so that two sums are under way
        parts.LANES, parts.LANE_ROWS = 0.0, 2
    die("open", RankContext, "assistant")
    die("step", Worker, "step")
    die("give", Leader, "give_back")
    die("get", Dispatcher, "_get_back")
    die("sum", Group, "begin")
    die("write", outcome, "write")
    return threads(world, *args)


if __name__ == "__main__":
    threads = World.limit_threads
    World.limit_threads = run  # type: ignore[method-assign]
    die("shrink", World, "_rejoin")
    die("stand", Departure, "arrived")
    sys.exit(main(sys.argv[2:]))
