"""A mixer with a state, for tests: some layers of a fixture become recurrent, or get a state beside their attention.

s = DECAY * s + x for each token in turn, and x += GAIN * s; the state s [hidden] begins as zeros. Each shard computes
all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpillm.model import cache_layout
from mpillm.model.cache_spec import LayerCache, SequenceState
from mpillm.model.decoder import Batch, Decoder
from mpillm.partition.grid import Place, Shape

DECAY, GAIN = np.float32(0.8), np.float32(0.25)


def install(patch: pytest.MonkeyPatch, recurrent: frozenset[int], both: frozenset[int] = frozenset()) -> None:
    """From now on layers `recurrent` of any model have a state instead of attention, and `both` have both."""
    layer_caches, attention, made = cache_layout.layer_caches, Decoder._attention, Decoder.__init__

    def caches(shape: Shape, place: Place, windows: Sequence[int]) -> list[tuple[LayerCache, ...]]:
        state = SequenceState(4 * shape.hidden)
        return [
            (state,) if number in recurrent else (*specs, state) if number in both else specs
            for number, specs in enumerate(layer_caches(shape, place, windows))
        ]

    def mix(
        self: Decoder, layer: Any, i: int, number: int, x: NDArray[np.float32], batch: Batch, *more: Any
    ) -> None:
        if number in recurrent | both:
            advance(self._kv.states(i).view(np.float32), x, batch)
        if number not in recurrent:
            attention(self, layer, i, number, x, batch, *more)

    def make(self: Decoder, *args: Any, **more: Any) -> None:
        made(self, *args, **more)
        self._plain = False

    patch.setattr(cache_layout, "layer_caches", caches)
    patch.setattr(Decoder, "_attention", mix)
    patch.setattr(Decoder, "__init__", make)


def advance(states: NDArray[np.float32], x: NDArray[np.float32], batch: Batch) -> None:
    """Take the rows x [m, hidden] of a step through the states [slot, hidden]."""
    ends = [*batch.first_rows[1:], len(x)]
    for first, end, slot in zip(batch.first_rows, ends, batch.slots, strict=True):
        state = states[slot]
        if batch.positions[first] == 0:
            state[:] = 0
        for row in range(first, end):
            state *= DECAY
            state += x[row]
            x[row] += GAIN * state
