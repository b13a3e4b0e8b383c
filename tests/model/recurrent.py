"""A mixer with a state, for tests: some layers of a fixture become recurrent, or get a state beside their attention.

s = DECAY * s + x for each token in turn, and x += GAIN * s; the state s [hidden] begins as zeros. Each shard computes
all of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpillm.model.cache_spec import LayerCache, SequenceState
from mpillm.model.config import ModelConfig
from mpillm.model.decoder import Batch, Decoder, _RankLayer
from mpillm.partition.grid import Place

DECAY, GAIN = np.float32(0.8), np.float32(0.25)


def install(patch: pytest.MonkeyPatch, recurrent: frozenset[int], both: frozenset[int] = frozenset()) -> None:
    """From now on layers `recurrent` of any model have a state instead of attention, and `both` have both."""
    cache, mix, forward, make = ModelConfig.cache, _RankLayer._mix, Decoder.forward, Decoder.__init__
    steps: list[Batch] = []

    def caches(self: ModelConfig, place: Place) -> list[tuple[LayerCache, ...]]:
        state = SequenceState(4 * self.hidden)
        return [
            (state,) if number in recurrent else (*specs, state) if number in both else specs
            for number, specs in enumerate(cache(self, place))
        ]

    def mixed(self: _RankLayer, page: Any, x: NDArray[np.float32], rows: Any) -> None:
        if self._number in recurrent | both:
            advance(self._kv.states(self._i).view(np.float32), x, steps[-1])
        if self._number not in recurrent:
            mix(self, page, x, rows)

    def noted(self: Decoder, batch: Batch) -> NDArray[np.float32] | None:
        steps[:] = [batch]
        return forward(self, batch)

    def made(self: Decoder, *args: Any, **more: Any) -> None:
        make(self, *args, **more)
        self._stackable = False

    patch.setattr(ModelConfig, "cache", caches)
    patch.setattr(_RankLayer, "_mix", mixed)
    patch.setattr(Decoder, "forward", noted)
    patch.setattr(Decoder, "__init__", made)


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
