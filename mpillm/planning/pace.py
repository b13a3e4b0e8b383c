"""Assume the speeds of ranks from their paces alone (`core_speed.pace`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpillm.planning.speed import ASSUMED, Speed

SAME = 1.3  # earlier measurements are still used if no pace has changed by more than this factor


def same(paces: Sequence[float], before: Sequence[float]) -> bool:
    """Return whether the ranks have about the paces that they had `before`."""
    return all(1 / SAME < now / then < SAME for now, then in zip(paces, before, strict=True))


def by_pace(paces: Sequence[float], ranks_per_host: Sequence[int]) -> Iterator[Speed]:
    """Yield the assumed speeds of ranks with these paces; ranks about as fast as the fastest one count as equal."""
    hosts, fastest = [count for count in ranks_per_host for _ in range(count)], max(paces)
    known: dict[tuple[float, int], Speed] = {}
    for own, count in zip(paces, hosts, strict=True):
        counted = fastest if fastest < SAME * own else own
        yield known.setdefault((counted, count), ASSUMED.shared_by(count).slowed(ASSUMED.core / counted))
