"""The interface of all token mixers, and the data with which they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from mpillm.model.batch import ForwardPass, Turn
from mpillm.model.cache_spec import LayerCache
from mpillm.model.kv import LayerCacheView
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.rank import Floats, Rank
from mpillm.partition.grid import Axis, Place
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.page import Page


class MixerInput(NamedTuple):
    """The data with which a mixer computes."""

    rank: Rank
    layer: int  # the number of the layer in the model
    page: Page  # the tensors of the layer
    norm: NormSpec | None  # the norm of `x`
    x: Floats  # [m, hidden]
    step: ForwardPass
    cache: LayerCacheView  # what the layer keeps of the step's sequences


class Mixer(Protocol):
    """A kind of token mixer, as data: equal ones are alike. `block` is as in `grid.axis`."""

    @property
    def fused(self) -> bool:
        """Whether it is an attention whose kernel may be part of a `kernels.LayerStack`."""

    @property
    def adaptable(self) -> tuple[str, ...]:
        """The roles of its matrices to which adapters may add."""

    @property
    def turn(self) -> Turn | None:
        """The RoPE of its heads, if they have one."""

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards."""

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Return the tensors of the mixer in a layer, in the order of a page."""

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """Return the part of a sequence that a layer keeps on the rank at `place`."""

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most; `copied`: bytes of a value in the forms in which matrices take it."""

    def compute(self, given: MixerInput) -> tuple[Floats, Floats | None]:
        """Return the sum of what all shards make of x [m, hidden], and the bias that is still to be added.

        The results of a sequence's rows do not depend on how they are cut into steps, nor on other sequences.
        """
