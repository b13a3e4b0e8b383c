"""The weight cache: bounded, and read ahead of its use by threads of its own.

A step uses a rank's items (the parts of its layers, then the output head) one after the other, over and over. Two
policies:

- `cycle` keeps a fixed part of the items for good and streams the others through what is left of the budget, which
  is the best that can be done for a cycle: its hit rate is the fixed part's share.
- `lru` drops what was used longest ago. Once the items exceed the budget it hits nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np

from mpillm.errors import JobError
from mpillm.weights.io.reading import Bytes, used_again
from mpillm.weights.plan import ALIGNMENT, LayerPlan


class Droppable(Protocol):
    """What a loader makes of a buffer; `Layer` is one."""

    def drop(self) -> None:
        """Let go of the buffer: the cache gives it to another item, or back to the system."""


T = TypeVar("T", bound=Droppable)
Made_co = TypeVar("Made_co", bound=Droppable, covariant=True)

Policy = Literal["cycle", "lru"]


class Loader(Protocol[Made_co]):
    """Where the items come from. The cache calls it from `parallel` threads of its own."""

    parallel: int

    def room(self, plan: LayerPlan, dropped: list[Bytes]) -> Bytes:
        """Bytes for an item; those of items that have just been dropped may be taken for it."""

    def load(self, plan: LayerPlan, buffer: Bytes) -> Made_co:
        """Fill the item's bytes, and make of them what `use` hands out."""

    def give_back(self, plan: LayerPlan) -> None:
        """The item was dropped: nobody looks at its bytes any more."""

    def close(self) -> None:
        """The cache is closed."""


class Heap(Generic[T]):
    """Items that a function makes, in memory of the process's own."""

    def __init__(self, make: Callable[[LayerPlan, Bytes], T], parallel: int = 1) -> None:
        self._make = make
        self.parallel = parallel

    def room(self, plan: LayerPlan, dropped: list[Bytes]) -> Bytes:
        return used_again(dropped, plan.nbytes, ALIGNMENT)

    def load(self, plan: LayerPlan, buffer: Bytes) -> T:
        return self._make(plan, buffer)

    def give_back(self, plan: LayerPlan) -> None:
        """The memory goes with the last view of it."""

    def close(self) -> None:
        """There is nothing to let go of."""


SMALL = 20  # an item that is less than one part in so many may be given up for reading further ahead
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly however many one takes


@dataclass
class Counters:
    """What the cache did. A use is a hit if its item was still there from an earlier use, else a miss.

    A miss that had to be waited for is a stall. `held` and `peak` are bytes of buffers, `loaded` bytes made ready;
    `load_seconds` adds up what several threads spend.
    """

    hits: int = 0
    hit_bytes: int = 0
    misses: int = 0
    miss_bytes: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0
    loads: int = 0
    loaded: int = 0
    load_seconds: float = 0.0
    held: int = 0
    peak: int = 0


class Slot(Generic[T]):
    """An item in memory, or on its way there (`layer` is None until it is ready)."""

    def __init__(self) -> None:
        self.buffer: Bytes = np.empty(0, np.uint8)
        self.layer: T | None = None
        self.users = 0
        self.used = False  # since it was loaded
        self.last_use = 0


class Pager(Generic[T]):
    """Items in memory, and the threads that load them; subclasses choose what comes next, and what goes for it.

    What the loader raises, the next use raises, and every one after it.
    """

    name: str  # of the cache, in words

    def __init__(self, items: Sequence[LayerPlan], loader: Loader[T]) -> None:
        self.items = tuple(items)
        self.total = sum(item.nbytes for item in self.items)
        self.counters = Counters()
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
        """Stop the threads (when they have finished the items they are at) and let all buffers go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for item in tuple(self._slots):
            self._drop(item)
            self._loader.give_back(self.items[item])
        self._loader.close()

    def _start(self) -> None:
        """Let the threads begin: all that `_choose` looks at is there."""
        for thread in self._threads:
            thread.start()

    def _choose(self) -> tuple[int, list[int]] | None:
        """The item to load now, and what has to go for it; None if nothing can be loaded."""
        raise NotImplementedError

    def _is_loaded(self, item: int) -> None:
        """An item has become ready."""

    def _count(self, item: int, slot: Slot[T] | None) -> bool:
        """Count a use; whether it is a hit."""
        hit = slot is not None and slot.used
        if hit:
            self.counters.hits += 1
            self.counters.hit_bytes += self.items[item].nbytes
        else:
            self.counters.misses += 1
            self.counters.miss_bytes += self.items[item].nbytes
        return hit

    def _settled(self, item: int) -> bool:
        """Whether there is nothing to wait for: the item is ready, or never will be."""
        slot = self._slots.get(item)
        return self._error is not None or self._closed or (slot is not None and slot.layer is not None)

    def _stall(self, item: int) -> None:
        """Wait until an item is settled, and count that."""
        start = time.monotonic()
        self._changed.notify_all()
        try:
            self._changed.wait_for(lambda: self._settled(item))
        finally:
            self.counters.stalls += 1
            self.counters.stall_seconds += time.monotonic() - start

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError(f"the {self.name} is closed")

    def _run(self) -> None:
        """A thread: whatever is best loaded next, one item at a time, until the cache is closed."""
        try:
            while self._load_next():
                pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load_next(self) -> bool:
        """Wait until an item can be loaded, and load it; False when the cache is closed."""
        with self._changed:
            found: tuple[int, list[int]] | None = None
            while not self._closed and (found := self._choose()) is None:
                self._changed.wait()
            if self._closed or found is None:
                return False
            item, victims = found
            plan = self.items[item]
            dropped = [self._drop(victim) for victim in victims]
            slot = self._slots[item] = Slot()
            self.counters.held += plan.nbytes
            self.counters.peak = max(self.counters.peak, self.counters.held)
        start = time.monotonic()
        for victim in victims:
            self._loader.give_back(self.items[victim])
        slot.buffer = self._loader.room(plan, dropped)
        dropped.clear()
        layer = self._loader.load(plan, slot.buffer)
        with self._changed:
            slot.layer = layer
            self._is_loaded(item)
            self.counters.loads += 1
            self.counters.loaded += plan.nbytes
            self.counters.load_seconds += time.monotonic() - start
            self._changed.notify_all()
        return True

    def _drop(self, item: int) -> Bytes:
        """Take an item out; whoever still has it in hand (after its `with` block) cannot keep the buffer alive."""
        slot = self._slots.pop(item)
        self.counters.held -= self.items[item].nbytes
        if slot.layer is not None:
            slot.layer.drop()
        return slot.buffer


class Use(Generic[T]):
    """The right to an item while in the `with` block: it stays in memory until the block is left."""

    def __init__(self, cache: WeightCache[T], item: int) -> None:
        self._cache = cache
        self._item = item

    def __enter__(self) -> T:
        return self._cache._acquire(self._item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cache._release(self._item)


class WeightCache(Pager[T]):
    """Items in memory, never more than `budget` bytes of them (None: all may stay).

    Uses may come from one thread at a time.
    """

    name = "weight cache"

    def __init__(
        self,
        items: Sequence[LayerPlan],
        loader: Loader[T],
        budget: int | None = None,
        policy: Policy = "cycle",
    ) -> None:
        """JobError if the budget has no room for an item in use and the next one."""
        if policy not in ("cycle", "lru"):
            raise JobError(f'The weight cache has no policy "{policy}"; it has cycle and lru.')
        super().__init__(items, loader)
        self.budget = self.total if budget is None else budget
        self.policy = policy
        least = minimum_budget(self.items)
        if self.budget < least:
            raise JobError(
                f"memory.weights is {self.budget} bytes, but this rank needs at least {least} bytes for the two "
                f"neighbouring items that are largest (of {self.total} for all); give it more, or use more ranks."
            )
        self.fixed = fixed_part(self.items, self.budget) if policy == "cycle" else frozenset()
        self._fixed_bytes = sum(self.items[i].nbytes for i in self.fixed)
        self._wanted: int | None = None  # what a use waits for
        self._cursor = -1  # the item that was asked for last
        self._clock = 0
        self._unused = len(self.items)  # items that no use has seen yet
        self._start()

    @property
    def streamed(self) -> int:
        """Bytes that every round of uses loads anew."""
        return self.total - self._fixed_bytes

    def use(self, item: int) -> Use[T]:
        """Item number `item`, ready and kept in memory for the length of a `with` block."""
        assert 0 <= item < len(self.items), item
        return Use(self, item)

    def deepen(self) -> None:
        """Let one item of the fixed part go, if a small one does: from now on one more is read ahead."""
        with self._changed:
            needed = max((item.nbytes for i, item in enumerate(self.items) if i not in self.fixed), default=0)
            suits = [i for i in self.fixed if needed <= self.items[i].nbytes <= self.total // SMALL]
            if suits:
                item = min(suits, key=lambda i: self.items[i].nbytes)
                self.fixed -= {item}
                self._fixed_bytes -= self.items[item].nbytes
                self._changed.notify_all()

    def _acquire(self, item: int) -> T:
        if not self._unused and len(self.fixed) == len(self.items) and not self._closed:
            return self._acquire_at_rest(item)
        with self._changed:
            self._cursor = item
            slot = self._slots.get(item)
            if not self._count(item, slot) or slot is None:
                slot = self._wait_for(item)
            self._check()
            assert slot.layer is not None
            self._clock += 1
            slot.users += 1
            if item in self.fixed and not slot.used:
                self._unused -= 1
            slot.used = True
            slot.last_use = self._clock
            self._tell_reader()
            return slot.layer

    def count_hits(self, items: int, nbytes: int) -> None:
        """Note uses of items by somebody who kept what they gave, as one may once everything is there and stays."""
        self.counters.hits += items
        self.counters.hit_bytes += nbytes

    def _acquire_at_rest(self, item: int) -> T:
        """Everything is there and stays: nobody else looks at the slots, so no lock is needed."""
        self.counters.hits += 1
        self.counters.hit_bytes += self.items[item].nbytes
        slot = self._slots[item]
        assert slot.layer is not None
        slot.users += 1
        return slot.layer

    def _wait_for(self, item: int) -> Slot[T]:
        if not self._settled(item):
            if (
                item not in self._slots
                and item not in self.fixed
                and self._room_at_best() < self.items[item].nbytes
            ):
                raise RuntimeError("more items of the weight cache are in use than its budget has room for")
            self._wanted = item
            try:
                self._stall(item)
            finally:
                self._wanted = None
        self._check()
        return self._slots[item]

    def _room_at_best(self) -> int:
        """Bytes for one more streamed item if everything else goes that is not in use."""
        used = [other for other, slot in self._slots.items() if slot.users and other not in self.fixed]
        return self.budget - self._fixed_bytes - sum(self.items[other].nbytes for other in used)

    def _tell_reader(self) -> None:
        """A use has begun or ended: the thread may now load what it could not, unless all items find room anyway."""
        if self.budget < self.total:
            self._changed.notify_all()

    def _release(self, item: int) -> None:
        with self._changed:
            slot = self._slots.get(item)
            if slot is not None:  # else the cache was closed meanwhile
                slot.users -= 1
            self._tell_reader()

    def _choose(self) -> tuple[int, list[int]] | None:
        """What a use waits for, else the next ones of the cycle as far as there is room."""
        if self._wanted is not None and self._wanted not in self._slots:
            victims = self._victims(self._wanted)
            return None if victims is None else (self._wanted, victims)
        n = len(self.items)
        depth = min(self._loader.parallel, n) if self.policy == "lru" else n
        ahead = [(self._cursor + step) % n for step in range(1, depth + 1)]
        blocked = False
        for item in ahead:
            if item in self._slots or (blocked and item not in self.fixed):
                continue
            if (victims := self._victims(item)) is not None:
                return item, victims
            blocked = True
        return None

    def _victims(self, item: int) -> list[int] | None:
        """What has to go for an item to come; None if it cannot come now (or is not worth what would go)."""
        if item in self.fixed:
            return []  # its room is kept for it
        size, room = self.items[item].nbytes, self.budget - self._fixed_bytes
        streamed = [other for other in self._slots if other not in self.fixed]
        room -= sum(self.items[other].nbytes for other in streamed)
        idle = [
            other
            for other in streamed
            if self._slots[other].layer is not None and not self._slots[other].users
        ]
        if item != self._wanted:
            # Nothing goes that is needed sooner, nor what was asked for last: it may be used once more, or not yet.
            idle = [other for other in idle if other != self._cursor]
            if self.policy == "cycle":
                idle = [other for other in idle if self._distance(other) > self._distance(item)]
        idle.sort(key=self._worth)
        victims: list[int] = []
        for other in idle:
            if room >= size:
                break
            victims.append(other)
            room += self.items[other].nbytes
        return victims if room >= size else None

    def _worth(self, item: int) -> tuple[bool, int]:
        """Least for what was used longest ago; more for what was read ahead, most if its turn comes soon."""
        slot = self._slots[item]
        return (False, slot.last_use) if slot.used else (True, -self._distance(item))

    def _distance(self, item: int) -> int:
        """How many uses from now an item's turn comes, if the cycle goes on."""
        return (item - self._cursor - 1) % len(self.items)


def minimum_budget(items: Sequence[LayerPlan]) -> int:
    """The least bytes that a cache of these items works with: an item in use, and the next one on its way."""
    if len(items) < 2:
        return sum(item.nbytes for item in items)
    return _largest_pair([item.nbytes for item in items])


def fixed_part(items: Sequence[LayerPlan], budget: int) -> frozenset[int]:
    """The items that stay for good; there is always room besides for two neighbouring ones of the others.

    Large items first, for they make the streaming part large; those of one size are spread evenly over the cycle, so
    that the use of a fixed one gives time to load a streamed one.
    """
    sizes = [item.nbytes for item in items]
    if sum(sizes) <= budget:
        return frozenset(range(len(sizes)))
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i * _GOLDEN % 1.0))
    fixed: set[int] = set()
    for item in order:
        rest = [size for i, size in enumerate(sizes) if i not in fixed and i != item]
        needed = _largest_pair(rest) if len(rest) > 1 else sum(rest)
        if sum(sizes[i] for i in fixed) + sizes[item] + needed <= budget:
            fixed.add(item)
    return frozenset(fixed)


def _largest_pair(sizes: Sequence[int]) -> int:
    """The most that two neighbours in the cycle have together."""
    return max(size + sizes[(i + 1) % len(sizes)] for i, size in enumerate(sizes))
