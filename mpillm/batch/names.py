"""A table of numbers by name for millions of names, in 16 bytes each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PARTS = 64  # tables over which names are spread: one of them grows at a time
RECENT = 64  # entries of a table that are not sorted yet


class NumbersByName:
    """Numbers of 64 bits by name. A name is known by a hash of 8 bytes, so two names may stand for each other."""

    def __init__(self) -> None:
        self._parts = [_Part() for _ in range(PARTS)]

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def get(self, name: str) -> int | None:
        """Return the number of a name; None if it has none."""
        wanted = _hash(name)
        return self._parts[wanted % PARTS].get(wanted)

    def add(self, name: str, number: int) -> int:
        """Return the number of a name, which is `number` if it has none yet."""
        wanted = _hash(name)
        part = self._parts[wanted % PARTS]
        found = part.get(wanted)
        if found is not None:
            return found
        part.add(wanted, number)
        return number

    def numbers(self) -> NDArray[np.int64]:
        """Return all numbers, in ascending order."""
        found = np.concatenate([numbers for part in self._parts for numbers in part.numbers()])
        found.sort()
        return found

    def drop_from(self, number: int) -> None:
        """Forget the names whose number is `number` or more."""
        for part in self._parts:
            part.drop_from(number)


class _Part:
    """Numbers by hash, in sorted arrays, each at least twice as long as the next one, and in a short dict."""

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._sorted: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []  # hashes, numbers

    def __len__(self) -> int:
        return len(self._recent) + sum(len(hashes) for hashes, _ in self._sorted)

    def get(self, wanted: int) -> int | None:
        found = self._recent.get(wanted)
        if found is not None:
            return found
        key = np.uint64(wanted)
        for hashes, numbers in self._sorted:
            at = int(hashes.searchsorted(key))
            if at < len(hashes) and hashes[at] == key:
                return int(numbers[at])
        return None

    def add(self, wanted: int, number: int) -> None:
        """Add a hash that is not there yet."""
        self._recent[wanted] = number
        if len(self._recent) >= RECENT:
            self._sort()

    def numbers(self) -> Iterator[NDArray[np.int64]]:
        yield np.fromiter(self._recent.values(), np.int64, len(self._recent))
        yield from (numbers for _, numbers in self._sorted)

    def drop_from(self, number: int) -> None:
        self._recent = {wanted: kept for wanted, kept in self._recent.items() if kept < number}
        self._sorted = [
            (hashes[numbers < number], numbers[numbers < number]) for hashes, numbers in self._sorted
        ]

    def _sort(self) -> None:
        hashes = np.fromiter(self._recent.keys(), np.uint64, len(self._recent))
        numbers = np.fromiter(self._recent.values(), np.int64, len(self._recent))
        self._recent = {}
        while self._sorted and len(self._sorted[-1][0]) < 2 * len(hashes):
            more = self._sorted.pop()
            hashes, numbers = np.concatenate([more[0], hashes]), np.concatenate([more[1], numbers])
        by = np.argsort(hashes)
        self._sorted.append((hashes[by], numbers[by]))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
