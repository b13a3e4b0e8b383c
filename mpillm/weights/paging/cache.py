"""The weight cache: the pages that every step uses, under a budget, read ahead of their use.

A step uses a rank's pages (those of its layers, then the LM head) in order, and so does the next step. Two policies:

- `cycle` keeps some pages for good and streams the others through the rest of the budget. This is optimal for a cycle:
  the hit rate is the share of the pages that are kept.
- `lru` evicts the page that was used longest ago. As soon as the pages exceed the budget, every use is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from types import TracebackType
from typing import Generic, Literal

import numpy as np

from mpillm.errors import JobError
from mpillm.weights.io.reading import Bytes
from mpillm.weights.paging.pager import Loader, Pager, Slot, T
from mpillm.weights.plan import PagePlan
from mpillm.words import enough

Policy = Literal["cycle", "lru"]

SMALL = 20  # only a page smaller than 1/20 of all pages is given up for reading further ahead
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly, whatever their number


class Use(Generic[T]):
    """A page that stays in memory until the `with` block is left."""

    def __init__(self, cache: WeightCache[T], page: int) -> None:
        self._cache = cache
        self._page = page

    def __enter__(self) -> T:
        return self._cache._acquire(self._page)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache._release(self._page)


class WeightCache(Pager[T]):
    """Pages in memory, never more than `budget` bytes of them (None: all may stay).

    Only one thread at a time may use pages.
    """

    name = "weight cache"

    def __init__(
        self,
        pages: Sequence[PagePlan],
        loader: Loader[T],
        budget: int | None = None,
        policy: Policy = "cycle",
    ) -> None:
        """Raises JobError if the budget is too small for a page in use and the next one."""
        if policy not in ("cycle", "lru"):
            raise JobError(f'The weight cache has no policy "{policy}"; it has cycle and lru.')
        super().__init__(pages, loader)
        self.budget = self.total if budget is None else budget
        self.policy = policy
        minimum = minimum_budget(self.pages)
        if self.budget < minimum:
            raise JobError(
                f"memory.weights is too small: this rank needs at least {enough(minimum)} for the two largest "
                f"neighbouring pages (of {enough(self.total)} for all); raise it, or use more ranks."
            )
        self.fixed = fixed_part(self.pages, self.budget) if policy == "cycle" else frozenset()
        self._fixed_bytes = sum(self.pages[i].nbytes for i in self.fixed)
        streamed = [i for i in range(len(self.pages)) if i not in self.fixed]
        if loader.takes_any_buffer and policy == "cycle" and streamed:
            largest = max(self.pages[i].nbytes for i in streamed)
            count = (self.budget - self._fixed_bytes) // largest
            if count >= min(2, len(streamed)):
                self._share_buffers(streamed, largest, count)
        self._wanted: int | None = None  # the page that a use waits for
        self._cursor = -1  # the page that was asked for last
        self._clock = 0
        self._numbers = {page.name: number for number, page in enumerate(self.pages)}
        self._unused = len(self.pages)  # pages that have not been used yet
        self._start()

    @property
    def streamed(self) -> int:
        """Bytes that each step loads again."""
        return self.total - self._fixed_bytes

    def use(self, page: int) -> Use[T]:
        """Page number `page`, loaded and kept in memory inside a `with` block."""
        assert 0 <= page < len(self.pages), page
        return Use(self, page)

    def count_hits(self, uses: int) -> None:
        """Count uses by a caller that kept the pages, as it may do once all are in memory and stay there."""
        self.counters.hits += uses

    def renew(self, let_go: Callable[[], object]) -> None:
        """Use what the loader makes anew, between two steps; `let_go` of what the caller holds of pages before."""
        if self.counters.loads < len(self.pages):
            return  # threads are still at it
        for plan, page in self._loader.renewed():
            let_go()
            slot = self._slots[self._numbers[plan.name]]
            assert slot.page is not None
            slot.page.drop()
            slot.page = page
            slot.buffer = np.empty(0, np.uint8)  # no view: it would keep all of it

    def read_further_ahead(self) -> None:
        """Remove a small page, if there is one, from the fixed part, so that one more page can be read ahead."""
        with self._changed:
            needed = max((page.nbytes for i, page in enumerate(self.pages) if i not in self.fixed), default=0)
            most = self.total // SMALL
            if self._equal:
                most = min(most, needed)
            suitable = [i for i in self.fixed if needed <= self.pages[i].nbytes <= most]
            if suitable:
                page = min(suitable, key=lambda i: self.pages[i].nbytes)
                self.fixed -= {page}
                self._fixed_bytes -= self.pages[page].nbytes
                self._changed.notify_all()

    def _allocate(self, page: int, dropped: list[Bytes]) -> Bytes:
        if self._equal and page not in self.fixed:
            return self._equal.take(dropped)
        return super()._allocate(page, dropped)

    def _acquire(self, page: int) -> T:
        if not self._unused and len(self.fixed) == len(self.pages) and not self._closed:
            return self._acquire_resident(page)
        with self._changed:
            self._cursor = page
            slot = self._slots.get(page)
            if not self._count(slot) or slot is None:
                slot = self._wait_for(page)
            self._check()
            assert slot.page is not None
            self._clock += 1
            slot.users += 1
            if page in self.fixed and not slot.used:
                self._unused -= 1
            slot.used = True
            slot.last_use = self._clock
            self._wake_threads()
            return slot.page

    def _acquire_resident(self, page: int) -> T:
        """Use a page when all pages are in memory for good: no thread touches the slots, so no lock is needed."""
        self.counters.hits += 1
        slot = self._slots[page]
        assert slot.page is not None
        slot.users += 1
        return slot.page

    def _wait_for(self, page: int) -> Slot[T]:
        if not self._settled(page):
            if (
                page not in self._slots
                and page not in self.fixed
                and self._free_at_best() < self._charged[page]
            ):
                raise RuntimeError("the pages in use exceed the budget of the weight cache")
            self._wanted = page
            try:
                self._stall(page)
            finally:
                self._wanted = None
        self._check()
        return self._slots[page]

    def _free_at_best(self) -> int:
        """Return bytes for one more streamed page if every page that is not in use is evicted."""
        used = [other for other, slot in self._slots.items() if slot.users and other not in self.fixed]
        return self.budget - self._fixed_bytes - sum(self._charged[other] for other in used)

    def _wake_threads(self) -> None:
        """Wake the threads after a use has begun or ended: they may load more now. If all pages fit, none waits."""
        if self.budget < self.total:
            self._changed.notify_all()

    def _release(self, page: int) -> None:
        with self._changed:
            slot = self._slots.get(page)
            if slot is not None:  # else the cache was closed meanwhile
                slot.users -= 1
            self._wake_threads()

    def _choose(self) -> tuple[int, list[int]] | None:
        """Return the page that a use waits for, else the next ones of the cycle as far as the budget allows."""
        if self._wanted is not None and self._wanted not in self._slots:
            victims = self._victims(self._wanted)
            return None if victims is None else (self._wanted, victims)
        n = len(self.pages)
        depth = min(self._loader.parallel, n) if self.policy == "lru" else n
        ahead = [(self._cursor + step) % n for step in range(1, depth + 1)]
        blocked = False
        for page in ahead:
            if page in self._slots or (blocked and page not in self.fixed):
                continue
            if (victims := self._victims(page)) is not None:
                return page, victims
            blocked = True
        return None

    def _victims(self, page: int) -> list[int] | None:
        """Return the pages to evict for a page; None if it cannot be loaded now, or is needed later than they are."""
        if page in self.fixed:
            return []  # the bytes of the page are reserved
        size, free = self._charged[page], self.budget - self._fixed_bytes
        streamed = [other for other in self._slots if other not in self.fixed]
        free -= sum(self._charged[other] for other in streamed)
        idle = [
            other
            for other in streamed
            if self._slots[other].page is not None and not self._slots[other].users
        ]
        if page != self._wanted:
            # Do not evict what is needed sooner, nor the page that was asked for last: its use may be about to begin.
            idle = [other for other in idle if other != self._cursor]
            if self.policy == "cycle":
                idle = [other for other in idle if self._distance(other) > self._distance(page)]
        idle.sort(key=self._worth)
        victims: list[int] = []
        for other in idle:
            if free >= size:
                break
            victims.append(other)
            free += self._charged[other]
        return victims if free >= size else None

    def _worth(self, page: int) -> tuple[bool, int]:
        """Eviction order, lowest first: used pages by their last use, then pages read ahead, the nearest one last."""
        slot = self._slots[page]
        return (False, slot.last_use) if slot.used else (True, -self._distance(page))

    def _distance(self, page: int) -> int:
        """Return the number of uses before this page's, if the cycle goes on."""
        return (page - self._cursor - 1) % len(self.pages)


def minimum_budget(pages: Sequence[PagePlan]) -> int:
    """Return the minimum budget of a cache of these pages, in bytes: a page in use and the next one being loaded."""
    return _largest_pair([page.nbytes for page in pages])


def fixed_part(pages: Sequence[PagePlan], budget: int) -> frozenset[int]:
    """Return the pages that stay for good; any two neighbouring ones of the others fit into the rest of the budget.

    Large pages are fixed first, because streaming them would need a large rest. Pages of one size are spread evenly
    over the cycle, so that a streamed page is loaded while a fixed one is used. If the budget allows, the rest has room
    for two pages of the largest size, so that buffers of one size do for all.
    """
    sizes = [page.nbytes for page in pages]
    if sum(sizes) <= budget:
        return frozenset(range(len(sizes)))
    fixed = _fixed(sizes, budget, _largest_twice)
    fits = sum(sizes[i] for i in fixed) + _largest_twice(_others(sizes, fixed)) <= budget
    return frozenset(fixed if fits else _fixed(sizes, budget, _largest_pair))


def _fixed(sizes: Sequence[int], budget: int, needed: Callable[[Sequence[int]], int]) -> set[int]:
    """Return the pages that stay for good; `needed` says how much room the others take."""
    fixed: set[int] = set()
    for page in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i * _GOLDEN % 1.0)):
        with_it = fixed | {page}
        if sum(sizes[i] for i in with_it) + needed(_others(sizes, with_it)) <= budget:
            fixed = with_it
    return fixed


def _others(sizes: Sequence[int], pages: Container[int]) -> list[int]:
    return [size for page, size in enumerate(sizes) if page not in pages]


def _largest_twice(sizes: Sequence[int]) -> int:
    """Return bytes of two buffers for any of these pages, or of one if there is one page."""
    return max(sizes, default=0) * min(2, len(sizes))


def _largest_pair(sizes: Sequence[int]) -> int:
    """Return the maximum size of two neighbours in the cycle."""
    if len(sizes) < 2:
        return sum(sizes)
    return max(size + sizes[(i + 1) % len(sizes)] for i, size in enumerate(sizes))
