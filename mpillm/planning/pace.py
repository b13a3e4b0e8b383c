"""What is assumed of ranks by their paces alone (`core_speed.pace`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpillm.planning.speed import ASSUMED, Speed

SAME = 1.3  # how many times as fast a rank may be as it was, and what was measured then still counts


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
