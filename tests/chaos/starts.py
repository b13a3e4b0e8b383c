"""The jobs that chaos starts, the ways of disturbing them, and the processes of a start."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from mpillm import spec
from mpillm.kernels import KV_BLOCK
from mpillm.planning import plan

CROWD = 4  # processes that want a core, from which on a rank's silence is stretched
WEIGHTS = 0.8  # of a rank's share of the weights that the variation with less memory may keep
KV_BLOCKS = 24  # of the variation with a small KV cache: sequences give way


@dataclass(frozen=True)
class Job:
    """What the same command says, again and again."""

    model: Path
    output: Path


@dataclass(frozen=True)
class Kind:
    """A way of disturbing a start."""

    do: Callable[[Start], object]
    codes: frozenset[int] | None = None  # that the start may end with; None: with any but CRASHED and 2
    while_computing: bool = True  # only: it wants a job that has begun


@dataclass
class Start:
    """A start of a job."""

    launcher: subprocess.Popen[bytes]
    job: Job
    on_hosts: bool
    said_before: int  # bytes in the log
    gone: int = 0  # ranks that were killed or stopped in it
    since: float = 0.0  # when it was disturbed last


def sizes(model: Path, stages: int, shards: int) -> tuple[int, int]:
    """Bytes of weights and of the KV cache that a start with little memory gets."""
    layout = [f"layout.stages={stages}", f"layout.shards={shards}"]
    job = spec.load(None, layout, model=str(model), input="in", output="out")
    ranks = plan.make(job, stages * shards).ranks
    weights = max(max(int(WEIGHTS * rank.weights_share), rank.weights_minimum) for rank in ranks)
    return weights, KV_BLOCKS * KV_BLOCK * max(rank.kv_token for rank in ranks)


def stretched(deadline: float) -> float:
    """The deadline for as many processes as want each core now: where they are many, a rank may be silent for long."""
    return deadline * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)) / CROWD)


def signalled(do: Callable[[Start], object]) -> Kind:
    return Kind(do, while_computing=False)


def kill(start: Start, left: list[psutil.Process]) -> None:
    for process in (start.launcher, *left):
        with contextlib.suppress(psutil.Error):
            process.kill()
    start.launcher.wait()


def file_size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def is_launcher(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return not is_rank(process)
    return True


def is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "mpillm" in words and "-m" in words and "python" in words[0]
    return False
