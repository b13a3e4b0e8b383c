"""Find how much memory a process may still take, by the machine and its control groups, and give some of it back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil

_CACHED = ("inactive_file", "active_file")  # pages of files, which the system takes back when it needs memory


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still get; `root` is where /proc and /sys are."""
    available: int = psutil.virtual_memory().available
    return max(0, min([available, *_left_in_groups(root)]))


def give_back() -> None:
    """Return to the system the memory that was freed, which glibc keeps; other C libraries keep little."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Return the free bytes of each group of version 2 (memory.max) or 1 (memory.limit_in_bytes) above this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = mount / path.lstrip("/")
        for at in (group, *group.parents):
            if at.is_relative_to(mount) and (left := _left(at)) is not None:
                yield left


def _left(group: Path) -> int | None:
    """Return the limit less the used bytes, without the pages of files; None if there is no limit."""
    try:
        second = (group / "memory.max").exists()
        limit = (group / ("memory.max" if second else "memory.limit_in_bytes")).read_text().strip()
        if limit == "max":
            return None
        used = int((group / ("memory.current" if second else "memory.usage_in_bytes")).read_text())
        found = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        prefix = "" if second else "total_"
        return int(limit) - used + sum(int(found.get(prefix + key, 0)) for key in _CACHED)
    except (OSError, ValueError):
        return None
