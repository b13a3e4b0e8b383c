"""Spread resident weights over the NUMA nodes whose cores use them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mpillm import kernels
from mpillm.weights.io.reading import Bytes


def count_nodes(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """Return how many NUMA nodes these logical CPUs belong to; 1 where the system does not say."""
    allowed = set(cpus)
    nodes = (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
    return max(1, sum(not allowed.isdisjoint(_numbers(node)) for node in nodes))


def _numbers(cpulist: Path) -> set[int]:
    """Return the CPUs of a list such as 0-3,8-11; an empty set if the file cannot be read."""
    try:
        ranges = re.findall(r"(\d+)(?:-(\d+))?", cpulist.read_text())
    except OSError:
        return set()
    return {cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def spread(memory: Bytes, threads: int, nodes: int | None = None) -> None:
    """Let the kernels' threads touch new `memory` first, where this process has cores of several nodes.

    Any thread may take any part of a matrix, so each gets every nth huge page: all nodes' memory is read at a time.
    Otherwise the pages would lie where the threads that load the weights happen to run.
    """
    if nodes is None:
        nodes = count_nodes(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if nodes > 1:
        kernels.first_touch(memory, threads)
