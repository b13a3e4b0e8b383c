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

from mpillm import kernels
from mpillm.bench.result import Machine

READ_BYTES = 2**30  # more than a cache holds
# Pieces take a millisecond or two, so that on a shared machine some of them run undisturbed.
PIECE_BYTES = 2**25
ROUNDS = 500_000  # the number of products
REPEATS = 50
FAST = 0.9  # the quantile of the rates that counts: a few pieces may have found their data in a cache


def measure(threads: Iterable[int], nbytes: int = READ_BYTES, rounds: int = ROUNDS) -> Machine:
    """Measure with each number of threads; without the compiled module the limits are empty."""
    threads = sorted(set(threads))
    made = Machine(cpu=_cpu(), cores=os.cpu_count() or 1, kernels=kernels.path(), read={}, int8={})
    if not threads:
        return made
    with contextlib.suppress(ImportError):
        limits: Any = importlib.import_module("mpillm.kernels._limits")
        data = np.ones(nbytes, np.uint8)
        for count in threads:
            pieces = [data[i : i + PIECE_BYTES] for i in range(0, nbytes, PIECE_BYTES)]
            rates = [len(piece) / seconds(limits.read, piece, count) for piece in pieces * 2]
            made.read[count] = float(np.quantile(rates, FAST))
            if operations := limits.int8(1, count):
                fastest = min(seconds(limits.int8, rounds, count) for _ in range(REPEATS))
                made.int8[count] = operations * rounds / fastest
    return made


def seconds(call: Callable[..., object], *args: object) -> float:
    """Return seconds of one call."""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
