"""The cache of experts: those that a step's tokens chose are loaded once each, and those used most often stay.

The experts that a layer needs are known only after its router has run. Then all that are missing are read at once,
while the ones before them are computed. Before that, while nothing else is to be read, those are read that the model
guesses from the rows of the layer before. A wrong guess costs time alone; the cache counts how many are right.

The expert that is likely to be needed last is evicted. A layer comes round once in a step, and each of its experts is
chosen with a probability p that is estimated from past steps. The expected distance of an expert's next use is
therefore (steps until the layer's turn) + 1/p - 1. If all experts are used in every step (large batches), this keeps
a fixed part and streams the rest, like the cycle of the other pages; if few are used, it keeps the most frequent ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mpillm.errors import JobError
from mpillm.weights.io.reading import Bytes
from mpillm.weights.paging.pager import Loader, Pager, Slot, T
from mpillm.weights.plan import PagePlan

SMOOTHING = 1 / 32  # the weight of the last step in the estimate of an expert's probability
WASTE = 0.25  # the maximum part of the budget that experts of several sizes may waste in buffers of one size
WORTH = 0.7  # the probability from which on a guess is read ahead: a wrong one delays what is needed
RAREST = 1e-4  # the lowest probability: experts that were never used are evicted in the order of their layers


class ExpertCache(Pager[T]):
    """Experts in memory, never more than `budget` bytes of them. Only one thread at a time may use them.

    `pages` are in the order of their layers.
    """

    name = "cache of experts"

    def __init__(self, pages: Sequence[PagePlan], loader: Loader[T], budget: int, chosen: float) -> None:
        """`chosen` is the share of a layer's experts that a token is sent to. JobError if the budget is too small."""
        super().__init__(pages, loader)
        self.budget = budget
        minimum = minimum_budget(self.pages)
        if budget < minimum:
            raise JobError(
                f"Experts get {budget} bytes of memory.weights, but need at least {minimum} bytes."
            )
        count, largest = len(self.pages), max(page.nbytes for page in self.pages)
        if loader.takes_any_buffer and not self.all_resident and largest * count * (1 - WASTE) <= self.total:
            self._share_buffers(range(count), largest, budget // largest)
        layers = sorted({page.layer for page in self.pages})
        position = {layer: number for number, layer in enumerate(layers)}
        self._layers = len(layers)
        self._layer = np.array([position[page.layer] for page in self.pages])
        self._current = -1  # the layer whose experts are in use
        self._queue: list[int] = []  # the experts of the step that are still to be used, in order
        self._expected: list[int] = []  # guesses that are worth reading, the likeliest first
        # Guesses by their layer, without those that were in memory: their places among all guesses, and pages.
        self._guesses: dict[int, tuple[list[int], list[int]]] = {}
        # How often the guess at each place was right.
        self._right = np.ones(1 + max(page.expert for page in self.pages))
        self._probability = np.full(count, chosen)
        self._used = np.zeros(count, bool)  # whether the step has used each expert
        self._idle = np.zeros(count, bool)  # whether each expert is in memory and not in use
        self._distance = np.zeros(count)  # expected steps until the next use
        self._evictable = np.zeros(count)  # the distance of idle pages that are not in the queue, else 0
        # The next page that is loaded without being asked for; there is none where some are streamed.
        self._ahead = 0 if self.all_resident else count
        self._start()

    @property
    def all_resident(self) -> bool:
        """Whether all pages stay in memory once they are loaded."""
        return self.total <= self.budget

    @property
    def streamed(self) -> int:
        """Bytes that a step loads again if its tokens choose every expert."""
        return max(self.total - self.budget, 0)

    def ready_groups(self, pages: Sequence[int]) -> Iterator[list[T]]:
        """Yield pages of one layer in order, in groups of those that are loaded; a group stays until the next one.

        The caller must exhaust the iterator.
        """
        if self.all_resident and self.counters.loads == len(self.pages) and not self._closed:
            yield self._use_resident(pages)
            return
        with self._changed:
            self._check()
            self._queue = list(pages)
            self._begin(pages)
            self._changed.notify_all()
        try:
            while self._queue:
                held = self._acquire()
                try:
                    yield [page for slot in held.values() if (page := slot.page) is not None]
                finally:
                    self._release(held)
        finally:
            with self._changed:
                self._queue = []

    def expect(self, pages: Sequence[int]) -> None:
        """Guess what the layer after the next use needs, the likeliest first, to be read while the disk is idle.

        All are of one layer. Only guesses are followed whose place among them was right often enough so far. Those that
        are in memory do not count, for what is used often is easily guessed.
        """
        with self._changed:
            missing = [place for place, page in enumerate(pages) if page not in self._slots]
            self._expected = []
            if missing:
                self._guesses[int(self._layer[pages[0]])] = missing, [pages[place] for place in missing]
                self._expected = [pages[place] for place in missing if self._right[place] >= WORTH]
                self._changed.notify_all()

    def _check_guesses(self, pages: Sequence[int]) -> None:
        """Note which guesses were right, now that it is known what their layer needs."""
        if self._current in self._guesses:
            places, guessed = self._guesses.pop(self._current)
            self._right[places] += SMOOTHING * (np.isin(guessed, pages) - self._right[places])

    def _begin(self, pages: Sequence[int]) -> None:
        """Note which experts the current layer needs, whether a step has ended, and which pages may be evicted."""
        if not pages:
            return
        layer = int(self._layer[pages[0]])
        if layer <= self._current:
            self._probability += SMOOTHING * (self._used - self._probability)
            np.maximum(self._probability, RAREST, out=self._probability)
            self._used[:] = False
        self._current = layer
        self._check_guesses(pages)
        if self._expected and self._layer[self._expected[0]] == layer:
            self._expected = []
        self._used[pages] = True
        turns = (np.arange(self._layers) - layer - 1) % self._layers / self._layers
        np.add(turns[self._layer], 1 / self._probability, out=self._distance)
        np.multiply(self._distance, self._idle, out=self._evictable)
        self._evictable[pages] = 0.0

    def _use_resident(self, pages: Sequence[int]) -> list[T]:
        """Use pages when all pages are in memory for good: no thread touches the slots, so no lock is needed."""
        found = []
        for page in pages:
            slot = self._slots[page]
            self._count(slot)
            slot.used = True
            assert slot.page is not None
            found.append(slot.page)
        return found

    def _acquire(self) -> dict[int, Slot[T]]:
        """Wait for the first page of the queue, and take the pages after it that are loaded too.

        They take at most half of the budget, so that others can be loaded meanwhile.
        """
        with self._changed:
            held: dict[int, Slot[T]] = {}
            free = self.budget // 2
            for page in self._queue:
                slot = self._slots.get(page)
                loaded = slot is not None and slot.page is not None
                free -= self._charged[page]
                if held and (not loaded or free < 0):
                    break
                self._count(slot)
                if not loaded:
                    self._stall(page)
                    self._check()
                slot = held[page] = self._slots[page]
                slot.used = True
                slot.users += 1
                self._idle[page] = False
            self._queue = self._queue[len(held) :]
            return held

    def _release(self, held: dict[int, Slot[T]]) -> None:
        with self._changed:
            for page, slot in held.items():
                slot.users -= 1
                if page in self._slots:  # else the cache was closed meanwhile
                    self._idle[page], self._evictable[page] = True, self._distance[page]
            if not self.all_resident:
                self._changed.notify_all()

    def _choose(self) -> tuple[int, list[int]] | None:
        """Return the first missing page of the queue, else the next page that is loaded without being asked for."""
        for place, page in enumerate(self._queue):
            if page not in self._slots:
                victims = self._victims(page, place)
                return None if victims is None else (page, victims)
        for page in self._expected:
            if page not in self._slots:
                found, enough = self._least_needed(page, self._expected)
                return (page, found) if enough else None
        while self._ahead < len(self.pages) and self._ahead in self._slots:
            self._ahead += 1
        return (self._ahead, []) if self._ahead < len(self.pages) else None

    def _least_needed(self, page: int, needed: Sequence[int] = ()) -> tuple[list[int], bool]:
        """Return the pages to evict for a page, none of those `needed`; whether they are enough."""
        free, size = self.budget - self.counters.held, self._charged[page]
        victims = list[int]()
        if free >= size:
            return victims, True
        evictable = self._evictable.copy()
        evictable[list(needed)] = 0.0
        while free < size and evictable[other := int(evictable.argmax())]:
            victims.append(other)
            free += self._charged[other]
            evictable[other] = 0.0
        return victims, free >= size

    def _victims(self, page: int, place: int) -> list[int] | None:
        """Return the pages to evict for the page at this place of the queue; None if others must be used before."""
        victims, enough = self._least_needed(page)
        if enough:
            return victims
        if place:
            return None
        # The first page of the queue is waited for: evict later pages of the queue, the last one first, and load them
        # again when their turn comes.
        free = self.budget - self.counters.held + sum(self._charged[other] for other in victims)
        for other in reversed(self._queue[1:]):
            if self._idle[other]:
                victims.append(other)
                free += self._charged[other]
                if free >= self._charged[page]:
                    return victims
        return None

    def _on_loaded(self, page: int) -> None:
        self._idle[page] = True
        if page not in self._queue:
            self._evictable[page] = self._distance[page]

    def _allocate(self, page: int, dropped: list[Bytes]) -> Bytes:
        return self._equal.take(dropped) if self._equal else super()._allocate(page, dropped)

    def _evict(self, page: int) -> Bytes:
        self._idle[page], self._evictable[page] = False, 0.0
        return super()._evict(page)


def minimum_budget(pages: Sequence[PagePlan]) -> int:
    """Return the minimum budget of a cache of these experts, in bytes: one in use, and the next one being loaded."""
    return sum(sorted(page.nbytes for page in pages)[-2:])
