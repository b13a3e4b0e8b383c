"""The limits of this machine: how fast memory is read, how fast 8-bit integers are multiplied and added."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ... import kernels
from .result import Machine

READ_BYTES = 2**30  # more than a cache holds
ROUNDS = 5_000_000  # of products: some tens of milliseconds
REPEATS = 5


def measure(threads: Iterable[int], nbytes: int = READ_BYTES, rounds: int = ROUNDS) -> Machine:
    """Measure with each number of threads; without compiled limits there are none."""
    made = Machine(cpu=_cpu(), cores=os.cpu_count() or 1, kernels=kernels.path(), read={}, int8={})
    with contextlib.suppress(ImportError):
        limits: Any = importlib.import_module("mpillm.kernels._limits")
        data = np.ones(nbytes, np.uint8)
        for count in sorted(set(threads)):
            made.read[count] = nbytes / best(lambda: limits.read(data, count))  # noqa: B023 - called at once
            seconds = best(lambda: limits.int8(rounds, count))  # noqa: B023
            if operations := limits.int8(1, count):
                made.int8[count] = operations * rounds / seconds
    return made


def best(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some calls: a limit is what can be reached, not what neighbours leave of it."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
