"""Measure the energy of this machine's processors, if Linux reports it (RAPL, /sys/class/powercap)."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
ZONE = re.compile(r"intel-rapl:\d+")  # a whole package (AMD has this name too), which contains other zones

Reading = dict[Path, int]  # microjoules of each package


class EnergyMeter:
    """The packages' counters that this process may read: none on most virtual machines, and for most users but root."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._ranges: Reading = {}
        for zone in sorted(root.glob("intel-rapl:*")):
            with contextlib.suppress(OSError, ValueError):
                if ZONE.fullmatch(zone.name) and (zone / "name").read_text().startswith("package"):
                    _number(zone / "energy_uj")
                    self._ranges[zone] = _number(zone / "max_energy_range_uj")

    def read(self) -> Reading:
        """Return the counters."""
        return {zone: _number(zone / "energy_uj") for zone in self._ranges}

    def joules(self, before: Reading, after: Reading) -> float | None:
        """Return the energy between two readings; None if unknown. A counter starts again at 0 after its range."""
        if not self._ranges:
            return None
        return sum((after[zone] - before[zone]) % (top + 1) for zone, top in self._ranges.items()) / 1e6


def _number(path: Path) -> int:
    return int(path.read_text())
