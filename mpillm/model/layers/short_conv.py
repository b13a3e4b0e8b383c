"""The gated short convolution, a token mixer that sees the last few tokens alone (Liquid AI's LFM2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpillm import kernels
from mpillm.model.cache_spec import LayerCache
from mpillm.model.layers.mixer import MixerInput
from mpillm.model.layers.rank import Floats
from mpillm.model.layers.recurrent import convolutions, kept_state, recur, taps_first
from mpillm.partition.grid import Axis, Place, axis
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class ShortConvSpec:
    """out(c(x) * conv(b(x) * v(x))) over `width` channels; the convolution sees `taps` rows."""

    width: int
    taps: int

    fused = False
    adaptable = ()

    def channels(self, block: int) -> Axis:
        """The axis of channels; `block` as in `grid.axis`."""
        return axis(self.width, block=block)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """The axes that limit the number of shards."""
        return (self.channels(block),)

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Its tensors in a layer, in the order in which they lie in a page."""
        channels = self.channels(block)
        for role in ("conv_b", "conv_c", "conv_v"):
            yield TensorSpec(Key(role, layer), (self.width, hidden), channels)
        yield from convolutions(layer, self.taps, [("conv_taps", self.width, channels)])
        yield TensorSpec(Key("conv_out", layer), (hidden, self.width), cols=channels)

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """What a layer keeps of a sequence on the rank at `place`: the convolution's last inputs."""
        return (kept_state(self.taps, len(self.channels(block).entries(place))),)

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Bytes that a row takes at most: three products, what the convolution makes, and what is multiplied."""
        width = len(self.channels(block).entries(place))
        return 4 * 4 * width + int(copied * (hidden + width))

    def compute(self, given: MixerInput) -> tuple[Floats, None]:
        """What all shards make of x [m, hidden]; there is no bias still to be added."""
        return recur(self, given)

    def kernel(
        self, page: Page, norm: kernels.Norm | None, place: Place, block: int
    ) -> kernels.GatedConvolution:
        """The kernels' operation of a loaded page, whose memory it refers to; `norm` is that of its input."""
        b, c, v, out = (page.matrix(f"conv_{name}") for name in ("b", "c", "v", "out"))
        return kernels.GatedConvolution(b, c, v, out, taps_first(page, "conv_taps", self.taps), norm=norm)
