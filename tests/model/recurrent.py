"""A mixer with a state, for tests: some layers of a fixture become recurrent, or get a state beside their attention.

s = DECAY * s + x for each token in turn, and s is added to x; the state s [hidden] begins as zeros. Each shard computes
all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from mpillm.model import opening
from mpillm.model.batch import ForwardPass
from mpillm.model.cache_spec import LayerCache, SequenceState
from mpillm.model.config import ModelConfig
from mpillm.model.layers.mixer import Mixer, MixerInput
from mpillm.model.layers.rank import Floats
from mpillm.partition.grid import Axis, Place
from mpillm.weights.inventory import TensorSpec

DECAY, GAIN = np.float32(0.8), np.float32(0.25)


@dataclass(frozen=True)
class Recurrent:
    """The state, with the attention whose tensors the layer has, which is computed too if `both`."""

    attention: Mixer
    hidden: int
    both: bool

    fused = False
    turn = None

    def axes(self, block: int) -> tuple[Axis, ...]:
        return self.attention.axes(block)

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        yield from self.attention.tensors(layer, hidden, block)

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        state = SequenceState(4 * self.hidden)
        return (*self.attention.cache(place, block), state) if self.both else (state,)

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        return self.attention.row_nbytes(place, block, hidden, copied)

    def compute(self, given: MixerInput) -> tuple[Floats, Floats | None]:
        part, bias = np.zeros_like(given.x), None
        self._advance(given.cache.states, given.x, part, given.step)
        if self.both:
            mixed, bias = self.attention.compute(given)
            part += mixed
        return part, bias

    def _advance(self, states: Floats, x: Floats, out: Floats, step: ForwardPass) -> None:
        batch = step.batch
        ends = [*batch.first_rows[1:], len(x)]
        for first, end, slot in zip(batch.first_rows, ends, batch.slots, strict=True):
            for row in range(first, end):
                states[slot] = states[slot] * DECAY + x[row]
                out[row] = GAIN * states[slot]


def install(patch: pytest.MonkeyPatch, recurrent: frozenset[int], both: frozenset[int] = frozenset()) -> None:
    """From now on layers `recurrent` of any model have a state instead of attention, and `both` have both."""
    read = opening.read_config

    def changed(config: Mapping[str, Any], name: str = "config.json") -> ModelConfig:
        model = read(config, name)
        layers = [
            replace(layer, mixer=Recurrent(layer.mixer, model.hidden, number not in recurrent))
            if number in recurrent | both
            else layer
            for number, layer in enumerate(model.layers)
        ]
        return replace(model, layers=tuple(layers))

    patch.setattr(opening, "read_config", changed)
