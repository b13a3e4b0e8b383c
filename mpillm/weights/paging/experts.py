"""The cache of a mixture's experts: what a step's tokens chose is paged in, each once, and the most used stay.

Which experts a layer needs is known only when its router has spoken, so nothing is read ahead of that; but then all
that are missing are read at a time, while those before them are computed.

What goes is what is likely to be needed last. An item's layer comes round once a step; its expert is chosen there with
a probability p that the steps so far tell, so its next use lies (steps until its layer's turn) + 1/p - 1 steps ahead.
Where all experts are used in every step (large batches) that keeps a fixed part and streams the rest, as the cycle of
the other weights does; where few are, it keeps those that are chosen most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from mpillm.errors import JobError
from mpillm.weights.io.reading import Bytes
from mpillm.weights.paging.cache import Droppable, Loader, Pager, Slot
from mpillm.weights.plan import LayerPlan

T = TypeVar("T", bound=Droppable)

SMOOTHING = 1 / 32  # how much of an expert's probability the last step decides
RAREST = 1e-4  # no probability falls below: what was never used goes in the order of the layers


class ExpertCache(Pager[T]):
    """Experts in memory, never more than `budget` bytes of them; uses come from one thread at a time.

    `items` come in the order of their layers.
    """

    name = "cache of experts"

    def __init__(self, items: Sequence[LayerPlan], loader: Loader[T], budget: int, chosen: float) -> None:
        """`chosen` is the share of a layer's experts that a token is sent to. JobError if the budget is too small."""
        super().__init__(items, loader)
        self.budget = budget
        least = minimum_budget(self.items)
        if budget < least:
            raise JobError(f"Experts get {budget} bytes of memory.weights, but need at least {least} bytes.")
        self._turn: list[int] = []  # the items of the layer at hand that are still to be used, in their order
        layers = sorted({item.layer for item in self.items})
        place = {layer: number for number, layer in enumerate(layers)}
        self._layer = np.array([place[item.layer] for item in self.items])
        self._layers = len(layers)
        self._now = -1  # the layer at hand
        self._probability = np.full(len(self.items), chosen)
        self._used = np.zeros(len(self.items), bool)  # in this step
        self._idle = np.zeros(len(self.items), bool)  # is in memory and not in use
        self._distance = np.zeros(len(self.items))  # steps until an item is likely to be needed
        self._may_go = np.zeros(
            len(self.items)
        )  # the same, of idle items that the turn does not need; else 0
        self._ahead = (
            0 if self.total <= budget else len(self.items)
        )  # next to be read without being asked for
        self._start()

    @property
    def stays(self) -> bool:
        """Whether all items stay in memory once they are there."""
        return self.total <= self.budget

    @property
    def streamed(self) -> int:
        """Bytes that a step loads anew if its tokens choose every expert."""
        return max(self.total - self.budget, 0)

    def in_turn(self, items: Sequence[int]) -> Iterator[list[T]]:
        """Items of one layer in their order, those together that are there, and in memory until the next are asked for.

        Run it to its end.
        """
        if self.stays and self.counters.loads == len(self.items) and not self._closed:
            yield self._at_rest(items)
            return
        with self._changed:
            self._check()
            self._turn = list(items)
            self._begin(items)
            self._changed.notify_all()
        try:
            while self._turn:
                held = self._acquire()
                try:
                    yield [layer for slot in held.values() if (layer := slot.layer) is not None]
                finally:
                    self._release(held)
        finally:
            with self._changed:
                self._turn = []

    def _begin(self, items: Sequence[int]) -> None:
        """Note which experts the layer at hand needs, and whether a step has ended; and what may go from now on."""
        if not items:
            return
        layer = int(self._layer[items[0]])
        if layer <= self._now:
            self._probability += SMOOTHING * (self._used - self._probability)
            np.maximum(self._probability, RAREST, out=self._probability)
            self._used[:] = False
        self._now = layer
        self._used[items] = True
        turns = (np.arange(self._layers) - layer - 1) % self._layers / self._layers
        np.add(turns[self._layer], 1 / self._probability, out=self._distance)
        np.multiply(self._distance, self._idle, out=self._may_go)
        self._may_go[items] = 0.0

    def _at_rest(self, items: Sequence[int]) -> list[T]:
        """Everything is there and stays: nobody else looks at the slots, so no lock is needed."""
        found = []
        for item in items:
            slot = self._slots[item]
            self._count(item, slot)
            slot.used = True
            assert slot.layer is not None
            found.append(slot.layer)
        return found

    def _acquire(self) -> dict[int, Slot[T]]:
        """Wait for the first item of the turn, and take those behind it that are there too.

        They take half of the budget at most, so that others find room meanwhile.
        """
        with self._changed:
            held: dict[int, Slot[T]] = {}
            room = self.budget // 2
            for item in self._turn:
                slot = self._slots.get(item)
                there = slot is not None and slot.layer is not None
                room -= self.items[item].nbytes
                if held and (not there or room < 0):
                    break
                self._count(item, slot)
                if not there:
                    self._stall(item)
                    self._check()
                slot = held[item] = self._slots[item]
                slot.used = True
                slot.users += 1
                self._idle[item] = False
            self._turn = self._turn[len(held) :]
            return held

    def _release(self, held: dict[int, Slot[T]]) -> None:
        with self._changed:
            for item, slot in held.items():
                slot.users -= 1
                if item in self._slots:  # else the cache was closed meanwhile
                    self._idle[item], self._may_go[item] = True, self._distance[item]
            if not self.stays:
                self._changed.notify_all()

    def _choose(self) -> tuple[int, list[int]] | None:
        """The item to load now, and what has to go for it: what the layer at hand needs, in its order."""
        for place, item in enumerate(self._turn):
            if item not in self._slots:
                victims = self._victims(item, place)
                return None if victims is None else (item, victims)
        while self._ahead < len(self.items) and self._ahead in self._slots:
            self._ahead += 1
        return (self._ahead, []) if self._ahead < len(self.items) else None

    def _victims(self, item: int, place: int) -> list[int] | None:
        """What goes for the item at this place of the turn; None if it cannot come before others have been used."""
        room, size = self.budget - self.counters.held, self.items[item].nbytes
        if room >= size:
            return []
        victims, may_go = list[int](), self._may_go.copy()
        while room < size and may_go[other := int(may_go.argmax())]:
            victims.append(other)
            room += self.items[other].nbytes
            may_go[other] = 0.0
        if room >= size:
            return victims
        if place:
            return None
        # It is waited for: what comes after it in its turn goes, the last one first, and is loaded once more.
        for other in reversed(self._turn[1:]):
            if self._idle[other]:
                victims.append(other)
                room += self.items[other].nbytes
                if room >= size:
                    return victims
        return None

    def _is_loaded(self, item: int) -> None:
        self._idle[item] = True
        if item not in self._turn:
            self._may_go[item] = self._distance[item]

    def _drop(self, item: int) -> Bytes:
        self._idle[item], self._may_go[item] = False, 0.0
        return super()._drop(item)


def minimum_budget(items: Sequence[LayerPlan]) -> int:
    """The least bytes that experts work with: one in use, and the next one on its way."""
    return sum(sorted(item.nbytes for item in items)[-2:])
