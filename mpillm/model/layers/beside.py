"""Token mixers beside each other: what they make of the same rows is added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpillm.model.batch import Turn
from mpillm.model.cache_spec import LayerCache
from mpillm.model.layers.mixer import Mixer, MixerInput
from mpillm.model.layers.rank import Floats
from mpillm.partition.grid import Axis, Place
from mpillm.weights.inventory import TensorSpec


@dataclass(frozen=True)
class BesideSpec:
    """The sum of what `mixers` make, each times its scale; at most one keeps tokens, and one a state (Falcon-H1)."""

    mixers: tuple[tuple[Mixer, float], ...]

    fused = False

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The roles of all its mixers to which adapters may add."""
        return tuple(role for mixer, _ in self.mixers for role in mixer.adaptable)

    @property
    def turn(self) -> Turn | None:
        """The RoPE of the one that keeps tokens."""
        return next((mixer.turn for mixer, _ in self.mixers if mixer.turn), None)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards; `block` as in `grid.axis`."""
        return tuple(axis for mixer, _ in self.mixers for axis in mixer.axes(block))

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Yield the tensors of all in a layer, in the order in which they lie in a page."""
        for mixer, _ in self.mixers:
            yield from mixer.tensors(layer, hidden, block)

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """Return the part of a sequence that a layer keeps on the rank at `place`."""
        return tuple(kept for mixer, _ in self.mixers for kept in mixer.cache(place, block))

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most: the widest mixer's, and the sum."""
        return 4 * hidden + max(mixer.row_nbytes(place, block, hidden, copied) for mixer, _ in self.mixers)

    def compute(self, given: MixerInput) -> tuple[Floats, None]:
        """Return the output of all shards for x [m, hidden]; no bias is left to add."""
        total = np.zeros_like(given.x)
        for mixer, scale in self.mixers:
            part, bias = mixer.compute(given)
            if bias is not None:
                part += bias
            if scale != 1.0:
                part *= np.float32(scale)
            total += part
        return total, None
