"""Pages in memory, and the threads that load them: what the two caches of weights have in common."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from mpillm import tracing
from mpillm.weights.io.reading import Bytes, EqualBuffers, used_again
from mpillm.weights.plan import ALIGNMENT, PagePlan


class Droppable(Protocol):
    """The interface of what a loader returns for a page; `Page` has it."""

    def drop(self) -> None:
        """Release the buffer: the cache gives it to another page, or back to the system."""


T = TypeVar("T", bound=Droppable)
Loaded_co = TypeVar("Loaded_co", bound=Droppable, covariant=True)


class Loader(Protocol[Loaded_co]):
    """Loads pages. A cache calls it from `parallel` threads of its own."""

    parallel: int
    takes_any_buffer: bool  # whether pages may be loaded to memory that `allocate` did not return

    def allocate(self, plan: PagePlan, dropped: list[Bytes]) -> Bytes:
        """Return a buffer for a page; it may be one of the buffers of pages that have just been dropped."""

    def load(self, plan: PagePlan, buffer: Bytes) -> Loaded_co:
        """Fill the page's buffer, and return what users of the page get."""

    def renewed(self) -> Iterable[tuple[PagePlan, Loaded_co]]:
        """Pages that the loader makes anew, one by one: use each instead of the one before, and drop that one.

        Called before each step but the first.
        """

    def release(self, plan: PagePlan) -> None:
        """Release a page that was dropped: nobody reads its bytes any more."""

    def close(self) -> None:
        """Release everything: the cache is closed."""


class BufferLoader(Generic[T]):
    """Pages that a function makes in buffers of the process's own memory."""

    def __init__(self, make: Callable[[PagePlan, Bytes], T], parallel: int = 1) -> None:
        self._make = make
        self.parallel = parallel
        self.takes_any_buffer = True

    def allocate(self, plan: PagePlan, dropped: list[Bytes]) -> Bytes:
        return used_again(dropped, plan.nbytes, ALIGNMENT)

    def load(self, plan: PagePlan, buffer: Bytes) -> T:
        return self._make(plan, buffer)

    def renewed(self) -> Iterable[tuple[PagePlan, T]]:
        return ()

    def release(self, plan: PagePlan) -> None:
        """Release a page; its buffer is freed with the last view of it."""

    def close(self) -> None:
        """There is nothing to release."""


@dataclass
class CacheCounters:
    """The counts of a cache. A use is a hit if the page was still in memory from an earlier use, else a miss.

    A miss that had to wait is a stall. `held` and `peak` are bytes of buffers, `loaded` is bytes that were loaded;
    `load_seconds` is the sum over all threads.
    """

    hits: int = 0
    misses: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    loads: int = 0
    loaded: int = 0
    load_seconds: float = 0.0
    held: int = 0
    peak: int = 0


class Slot(Generic[T]):
    """A page in memory, or one that is being loaded (then `page` is None)."""

    def __init__(self) -> None:
        self.buffer: Bytes = np.empty(0, np.uint8)
        self.page: T | None = None
        self.users = 0
        self.used = False  # since it was loaded
        self.last_use = 0


class Pager(Generic[T]):
    """Pages in memory and the threads that load them; subclasses choose what is loaded next and what is evicted.

    An error of the loader is raised by the next use and by all later ones.
    """

    name: str  # the name of the cache, in words

    def __init__(self, pages: Sequence[PagePlan], loader: Loader[T]) -> None:
        self.pages = tuple(pages)
        self.total = sum(page.nbytes for page in self.pages)
        self.counters = CacheCounters()
        self._charged = [page.nbytes for page in self.pages]  # bytes of the budget that each takes
        self._equal: EqualBuffers | None = None  # for pages of equal sizes, once pages come and go
        self._loader = loader
        self._slots: dict[int, Slot[T]] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"{self.name} {number}", daemon=True)
            for number in range(loader.parallel)
        ]

    def close(self) -> None:
        """Stop the threads (after the pages that they are loading) and drop all pages.

        They are not released: the system may keep what they were read from for the next run.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for page in tuple(self._slots):
            self._evict(page)
        self._loader.close()

    def _start(self) -> None:
        """Start the threads: everything that `_choose` reads is there."""
        for thread in self._threads:
            thread.start()

    def _share_buffers(self, pages: Iterable[int], nbytes: int, count: int) -> None:
        """Have these pages use `count` buffers of one size, which each of them then takes of the budget."""
        self._equal = EqualBuffers(nbytes, count)
        for page in pages:
            self._charged[page] = nbytes

    def _allocate(self, page: int, dropped: list[Bytes]) -> Bytes:
        """Return a buffer for a page: new, or one of those just dropped; it may be longer than the page."""
        return self._loader.allocate(self.pages[page], dropped)

    def _choose(self) -> tuple[int, list[int]] | None:
        """Return the page to load now and the pages to evict for it; None if nothing can be loaded."""
        raise NotImplementedError

    def _on_loaded(self, page: int) -> None:
        """Note that a page has been loaded."""

    def _count(self, slot: Slot[T] | None) -> bool:
        """Count a use; return whether it is a hit."""
        hit = slot is not None and slot.used
        if hit:
            self.counters.hits += 1
        else:
            self.counters.misses += 1
        return hit

    def _settled(self, page: int) -> bool:
        """Return whether there is nothing to wait for: the page is loaded, or never will be."""
        slot = self._slots.get(page)
        return self._error is not None or self._closed or (slot is not None and slot.page is not None)

    def _stall(self, page: int) -> None:
        """Wait until a page is settled, and count the stall."""
        start = time.monotonic()
        self._changed.notify_all()
        try:
            self._changed.wait_for(lambda: self._settled(page))
        finally:
            seconds = time.monotonic() - start
            self.counters.stalls += 1
            self.counters.stall_seconds += seconds
            tracing.add("wait for weights", start, seconds, page=self.pages[page].name)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError(f"the {self.name} is closed")

    def _run(self) -> None:
        """Load one page after the other, until the cache is closed (the body of a thread)."""
        try:
            while self._load_next():
                pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load_next(self) -> bool:
        """Wait until a page can be loaded, and load it; False when the cache is closed."""
        with self._changed:
            found: tuple[int, list[int]] | None = None
            while not self._closed and (found := self._choose()) is None:
                self._changed.wait()
            if self._closed or found is None:
                return False
            page, victims = found
            plan = self.pages[page]
            dropped = [self._evict(victim) for victim in victims]
            slot = self._slots[page] = Slot()
            self.counters.held += self._charged[page]
            self.counters.peak = max(self.counters.peak, self.counters.held)
        start = time.monotonic()
        for victim in victims:
            self._loader.release(self.pages[victim])
        slot.buffer = self._allocate(page, dropped)
        dropped.clear()
        loaded = self._loader.load(plan, slot.buffer[: plan.nbytes] if self._equal else slot.buffer)
        with self._changed:
            slot.page = loaded
            self._on_loaded(page)
            self.counters.loads += 1
            self.counters.loaded += plan.nbytes
            seconds = time.monotonic() - start
            self.counters.load_seconds += seconds
            self._changed.notify_all()
        tracing.add("load", start, seconds, page=plan.name, bytes=plan.nbytes)
        return True

    def _evict(self, page: int) -> Bytes:
        """Remove a page; a user that still refers to it (after its `with` block) cannot keep the buffer alive."""
        slot = self._slots.pop(page)
        self.counters.held -= self._charged[page]
        if slot.page is not None:
            slot.page.drop()
        return slot.buffer
