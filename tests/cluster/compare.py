"""Compare the layout that mpillm chooses with others: each runs several times, in turns, with the same ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from mpillm.planning import hosts
from mpillm.planning.hosts import Host

FAST = Host(memory="8GiB", name="fast", products={"q4_0": [70.0, 150.0, 200.0]})
SLOW = {"q4_0": [0.01, 0.01, 0.01]}  # 10^9 operations/s: a host that no job uses
ROUNDS = 3  # of each layout


class JobRun(NamedTuple):
    """A job that was run: its seconds, all but mpiexec's start, its layout, and the planned seconds (0: no speeds)."""

    seconds: float
    layout: str
    planned: float


RunJob = Callable[..., JobRun]  # of `Cluster.job`: the model, the ranks, the lines, and settings


def compare(
    job: RunJob, folder: Path, model: Path, ranks: int, lines: int, name: str, rounds: int = ROUNDS
) -> float:
    """Run a job on every kind of layout of so many hosts, and as mpillm chooses; return the part of the best.

    All ranks are started for each layout, also for that of one host, so that layouts differ in nothing else; a run of
    one rank alone is a line of its own. The layouts take turns, because the machine's speed changes. Of medians of few
    runs the least one is that of luck: what auto takes beside the same layout set by hand shows how much that is.
    """
    alone = folder / "alone.toml"
    hosts.write(alone, [FAST, msgspec.structs.replace(FAST, name="slow", count=ranks - 1, products=SLOW)])
    ways = {
        "one rank": (1, ()),
        "one host": (ranks, (f"layout.hosts={alone}",)),
        "replicas": (ranks, (f"layout.replicas={ranks}",)),
        "stages": (ranks, ("layout.replicas=1", f"layout.stages={ranks}")),
        "auto": (ranks, ()),
    }
    if ranks.bit_count() == 1:
        ways["shards"] = ranks, ("layout.replicas=1", f"layout.shards={ranks}")
    if ranks == 4:
        ways["2 x 2"] = ranks, ("layout.replicas=1", "layout.stages=2", "layout.shards=2")
    took: dict[str, list[JobRun]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in list(ways)[:: -1 if turn % 2 else 1]:
            own, words = ways[way]
            took[way].append(job(model, own, lines, *words))
    seconds = {way: median(run.seconds for run in runs) for way, runs in took.items()}
    for way, runs in took.items():
        every = " ".join(f"{run.seconds:.2f}" for run in runs)
        print(
            f"{name} {lines} answers, {way:9} {seconds[way]:7.2f} s ({every})  {in_words(runs[-1])}",
            flush=True,
        )
    least = min(seconds, key=lambda way: seconds[way])
    part = seconds[least] / seconds["auto"]
    print(f"{name} {lines} answers: auto reaches {part:.2f} of the best ({least}){beside(took)}", flush=True)
    return part


def beside(took: Mapping[str, Sequence[JobRun]]) -> str:
    """Say how auto compares with the same layout set by hand, if all of its runs chose one that was run too."""
    chosen = {run.layout for run in took["auto"]}
    same = [
        run.seconds
        for way, runs in took.items()
        for run in runs
        if way not in ("auto", "one rank") and {run.layout} == chosen
    ]
    if not same:
        return ""
    return f", {median(same) / median(run.seconds for run in took['auto']):.2f} of its layout set by hand"


def in_words(run: JobRun) -> str:
    """The layout of a run, with the seconds that were planned."""
    return run.layout + (f" ({run.planned:.2f} s planned)" if run.planned else "")
