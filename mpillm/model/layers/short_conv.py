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

_BIASES = "conv_b_bias", "conv_c_bias", "conv_v_bias", "conv_taps_bias"


@dataclass(frozen=True)
class ShortConvSpec:
    """out(c(x) * conv(b(x) * v(x))) over `width` channels; the convolution sees `taps` rows.

    With `bias` the products and the convolution have biases.
    """

    width: int
    taps: int
    bias: bool = False

    fused = False
    adaptable = ()
    turn = None

    def channels(self, block: int) -> Axis:
        """Return the axis of channels; `block` as in `grid.axis`."""
        return axis(self.width, block=block)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards."""
        return (self.channels(block),)

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Yield the tensors of the mixer in a layer, in the order of a page."""
        channels = self.channels(block)
        for role in ("conv_b", "conv_c", "conv_v"):
            yield TensorSpec(Key(role, layer), (self.width, hidden), channels)
        yield from convolutions(layer, self.taps, [("conv_taps", self.width, channels)])
        yield TensorSpec(Key("conv_out", layer), (hidden, self.width), cols=channels)
        if self.bias:
            for role in _BIASES:
                yield TensorSpec(Key(role, layer), (self.width,), channels)
            yield TensorSpec(Key("conv_out_bias", layer), (hidden,))

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """Return the part of a sequence that a layer keeps on the rank at `place`: the convolution's last inputs."""
        return (kept_state(self.taps, len(self.channels(block).entries(place))),)

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most: three products, what the convolution makes, and what is multiplied."""
        width = len(self.channels(block).entries(place))
        return 4 * 4 * width + int(copied * (hidden + width))

    def compute(self, given: MixerInput) -> tuple[Floats, Floats | None]:
        """Return the output of all shards for x [m, hidden], and the output's bias."""
        return recur(self, given, out_bias="conv_out_bias" if self.bias else "")

    def kernel(
        self, page: Page, norm: kernels.Norm | None, place: Place, block: int
    ) -> kernels.GatedConvolution:
        """Return the kernels' operation of a loaded page, whose memory it refers to; `norm` is that of its input."""
        b, c, v, out = (page.matrix(f"conv_{name}") for name in ("b", "c", "v", "out"))
        taps = taps_first(page, "conv_taps", self.taps)
        if not self.bias:
            return kernels.GatedConvolution(b, c, v, out, taps, norm=norm)
        *biases, conv_bias = (page.vector(role) for role in _BIASES)
        return kernels.GatedConvolution(b, c, v, out, taps, norm=norm, biases=biases, conv_bias=conv_bias)
