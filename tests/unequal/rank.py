"""Program of `tests.unequal.losses`: `rank.py FOLDER mpillm ARGUMENTS...` is mpillm on ranks that differ.

`FOLDER/plan.json` is a `Plan`: some of the ranks die. Each death comes once, however often ranks are started: it has a
file there.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mpillm.comm.departure import Departure
from mpillm.comm.world import World

HANG = "HANG"  # instead of a signal: the rank does nothing any more
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))


class Death(msgspec.Struct, frozen=True):
    """A rank gets a signal when it comes to a point for the `count`th time."""

    rank: int
    point: str
    count: int
    signal: str = "SIGKILL"


class Plan(msgspec.Struct, frozen=True):
    """What happens to a start."""

    seed: str  # of the differences
    deaths: list[Death] = []
    slow: int | None = None  # the rank that becomes slow
    moves: bool = False  # replicas give lines back


def watch(folder: Path, plan: Plan, point: str, owner: Any, method: str) -> None:
    """Have this rank die, if the plan says so, when `owner.method` is called."""
    own = [(n, one) for n, one in enumerate(plan.deaths) if (one.rank, one.point) == (RANK, point)]
    if not own:
        return
    original: Callable[..., Any] = getattr(owner, method)
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        for number, death in own:
            if calls >= death.count:
                try:
                    (folder / f"death-{number}").rename(folder / f"died-{number}")
                except FileNotFoundError:
                    continue
                (folder / f"died-{number}").touch()
                if death.signal == HANG:
                    threading.Event().wait()
                os.kill(os.getpid(), signal.Signals[death.signal])
        return original(*args, **kwargs)

    setattr(owner, method, call)


def slow_down(victim: bool) -> None:
    """Compare ranks often, and make the victim take longer for its layers from its 10th step on."""
    from mpillm.model.decoder import Decoder
    from mpillm.partition import grid
    from mpillm.run import balance

    balance.WINDOW, balance.TELL_EVERY, balance.COST = 0.5, 0.1, 0.0
    forward, steps = Decoder.forward, 0

    def slow(decoder: Decoder, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 10 and victim:
            time.sleep(0.02 * len(grid.stage_layers(decoder.config.n_layers, decoder.place)))
        return forward(decoder, batch)

    Decoder.forward = slow  # type: ignore[method-assign]


def move_lines() -> None:
    """Have other leaders give all of their lines back now and then."""
    from mpillm.run import assistant, sharing

    draw = random.Random(1)

    def targets(self: sharing.Sharing, held: Sequence[int], waiting: int) -> list[int] | None:
        lines, first = sum(held) + waiting, draw.randrange(len(held))
        if not lines or draw.random() < 0.7:
            return None
        return [lines if replica == first else 0 for replica in range(len(held))]

    sharing.Sharing.targets = targets  # type: ignore[method-assign]
    sharing.LOOK, assistant.TELL_EVERY = 0.05, 0.1


def computing(folder: Path, plan: Plan) -> None:
    """Change what computes, which is loaded only when the program's threads are known."""
    from mpillm.comm.collectives import Group
    from mpillm.engine.worker import Worker
    from mpillm.planning import measure
    from mpillm.run import outcome, states
    from mpillm.run.dispatch import Dispatcher
    from mpillm.run.leader import Leader
    from mpillm.run.session import Session
    from mpillm.store.journal import Journal
    from mpillm.weights.identity import Watch
    from tests.unequal.differing import CONSTANTS, differ, exchange

    CONSTANTS.pop((exchange, "HEAD"), None)  # all ranks must change it at the same moment
    differ(random.Random(plan.seed), random.Random(f"{plan.seed} {RANK}"))
    if plan.slow is not None:
        slow_down(plan.slow == RANK)
    if plan.moves:
        move_lines()
    for point, owner, method in (
        ("begin", Session, "__init__"),
        ("layout", Session, "_lay_out"),
        ("measure", measure, "speeds"),
        ("model", Session, "_agree_on_model"),
        ("worker", Session, "_make_worker"),
        ("made", Session, "_plans"),
        ("opened", states, "what_was_lost"),
        ("step", Worker, "step"),
        ("sum", Group, "begin"),
        ("give", Leader, "give_back"),
        ("get", Dispatcher, "_get_back"),
        ("part", Dispatcher, "part"),
        ("check", Watch, "check_all"),
        ("count", states, "rank_statistics"),
        ("again", states.Restarting, "advance"),
        ("regroup", states.Regrouping, "advance"),
        ("wait", states.Waiting, "advance"),
        ("write", outcome, "write"),
        ("finish", Journal, "finish"),
    ):
        watch(folder, plan, point, owner, method)


def main() -> int:
    """Run mpillm, or `launch` with this program as its ranks."""
    from mpillm.cli import main as mpillm

    folder, words = Path(sys.argv[1]), sys.argv[3:]
    if words[0] == "launch":
        from mpillm.launching import mpiexec

        own = [sys.executable, __file__, str(folder), "mpillm"]
        mpiexec.program = lambda arguments: [*own, *arguments]
        return mpillm(words)
    plan, threads, done = (
        msgspec.json.decode((folder / "plan.json").read_bytes(), type=Plan),
        World.limit_threads,
        [],
    )

    def limit_threads(world: World, *args: Any) -> Any:
        if not done:
            done.append(computing(folder, plan))
        return threads(world, *args)

    World.limit_threads = limit_threads  # type: ignore[method-assign]
    for point, owner, method in (
        ("meet", World, "_join"),
        ("shrink", World, "_rejoin"),
        ("stand", Departure, "arrived"),
        ("end", World, "depart"),
    ):
        watch(folder, plan, point, owner, method)
    return mpillm(words)


if __name__ == "__main__":
    sys.exit(main())
