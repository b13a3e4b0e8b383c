"""How fast a rank runs plain code: a look of milliseconds, where to measure more would take longer than it may gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mpillm.planning.kernel_rates import WHOLE, core_speed
from mpillm.planning.speed import ASSUMED, Speed

SECONDS, TURNS = 0.001, 2000
SAME = 1.3  # how many times as fast a rank may be as it was, and what was measured then still counts
WAITED = Path("/proc/self/schedstat")  # the nanoseconds that this thread has run, and has waited for a core


def pace() -> float:
    """How fast a core runs this rank's plain code, as `Speed.core`; of a core that others use too, its part."""
    return core_speed(SECONDS, TURNS) * part_so_far(WAITED)


def part_so_far(waited: Path) -> float:
    """The part of a core that this process has got since it started (mostly while it imported modules).

    It is less than 1 if a control group has a quota, which a container may hide, or if other programs compute.
    """
    try:
        ran, waiting = map(int, waited.read_text().split()[:2])
    except (OSError, ValueError):  # not Linux, or a kernel that does not count it
        return 1.0
    part = ran / (ran + waiting) if ran else 1.0
    return part if part < WHOLE else 1.0


def same(paces: Sequence[float], before: Sequence[float]) -> bool:
    """Whether ranks are about as fast as they were."""
    return all(1 / SAME < now / then < SAME for now, then in zip(paces, before, strict=True))


def by_pace(paces: Sequence[float], ranks_per_host: Sequence[int]) -> Iterator[Speed]:
    """What is assumed of ranks of these paces; those that are about as fast as the fastest one are alike."""
    hosts, fastest = [count for count in ranks_per_host for _ in range(count)], max(paces)
    known: dict[tuple[float, int], Speed] = {}
    for own, count in zip(paces, hosts, strict=True):
        counted = fastest if fastest < SAME * own else own
        yield known.setdefault((counted, count), ASSUMED.shared_by(count).slowed(ASSUMED.core / counted))
