"""Memory cgroups for jobs, as Slurm and containers make them."""

from __future__ import annotations

import os
from pathlib import Path

SPARE = 1.1  # of what is planned: the docs say to ask for so much
CGROUPS = Path("/sys/fs/cgroup")


class Cgroup:
    """A memory cgroup below this process's own, of version 1 or 2."""

    def __init__(self) -> None:
        """OSError if there is none, or not for us."""
        own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        first = next((path for names, path in own.items() if "memory" in names.split(",")), None)
        self.first = first is not None
        parent = CGROUPS / "memory" / first[1:] if first else CGROUPS / own[""][1:]
        self.path = parent / f"mpillm-test-{os.getpid()}"
        self.path.mkdir()
        if not self.file("max").exists():
            self.path.rmdir()
            raise OSError("the memory controller is not delegated to this cgroup")

    def file(self, what: str) -> Path:
        names = {
            "max": "memory.limit_in_bytes",
            "peak": "memory.max_usage_in_bytes",
            "kills": "memory.oom_control",
        }
        later = {"max": "memory.max", "peak": "memory.peak", "kills": "memory.events"}
        return self.path / (names if self.first else later)[what]

    def limit(self, nbytes: int) -> None:
        self.file("max").write_text(str(nbytes))

    def kills(self) -> int:
        lines = (line.split() for line in self.file("kills").read_text().splitlines())
        return int(dict(lines)["oom_kill"])

    def swapped(self) -> int:
        if not self.first:
            return int((self.path / "memory.swap.current").read_text())
        lines = (line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        return int(dict(lines).get("swap", 0))
