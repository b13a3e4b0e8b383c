"""Gated DeltaNet, the token mixer that keeps a matrix for each head and writes over what it finds there.

(Yang, Kautz and Hatamizadeh, Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024; layers of Qwen3-Next and
Qwen 3.5.) Rows pass one after the other in one fixed order of operations, also in prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpillm import kernels
from mpillm.kernels import lanes
from mpillm.model.cache_spec import LayerCache
from mpillm.model.layers.mixer import MixerInput
from mpillm.model.layers.norm import NormSpec
from mpillm.model.layers.rank import Floats
from mpillm.model.layers.recurrent import convolutions, kept_state, recur, taps_first
from mpillm.partition.grid import Axis, Place, axis
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class GatedDeltaSpec:
    """n_heads heads with values of `dv` dimensions each; n_keys heads of queries and keys of `dk`, shared by those.

    Head i uses key head i // (n_heads / n_keys), or if they are `tiled` i % n_keys, as llama.cpp stores some models;
    shards then hold all key heads. The convolutions see `taps` rows. `log_rates`: the tensor has logarithms of the
    rates, else the negative rates.
    """

    n_keys: int
    n_heads: int
    dk: int
    dv: int
    taps: int
    out_norm: NormSpec
    tiled: bool = False
    log_rates: bool = True

    fused = False
    adaptable = ()
    turn = None

    @property
    def share(self) -> int:
        """The heads that are cut together."""
        return 1 if self.tiled else self.n_heads // self.n_keys

    def heads(self, block: int) -> Axis:
        """Return the axis of values: heads, in groups of those that share a key head."""
        return axis(self.n_heads // self.share, self.share * self.dv, block)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards; `block` as in `grid.axis`."""
        return (self.heads(block),)

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Yield the tensors of the mixer in a layer, in the order of a page."""
        values = self.heads(block)
        each = Axis(values.bounds, self.share)
        keys = None if self.tiled else Axis(values.bounds, self.dk)
        wide, narrow = self.n_keys * self.dk, self.n_heads * self.dv
        for role, width, rows in (
            ("delta_q", wide, keys),
            ("delta_k", wide, keys),
            ("delta_v", narrow, values),
            ("delta_gate", narrow, values),
            ("delta_beta", self.n_heads, each),
            ("delta_alpha", self.n_heads, each),
        ):
            yield TensorSpec(Key(role, layer), (width, hidden), rows)
        convs = [("delta_q_conv", wide, keys), ("delta_k_conv", wide, keys), ("delta_v_conv", narrow, values)]
        yield from convolutions(layer, self.taps, convs)
        yield TensorSpec(Key("delta_rates", layer), (self.n_heads,), each)
        yield TensorSpec(Key("delta_dt_bias", layer), (self.n_heads,), each)
        yield from self.out_norm.tensors("delta_norm", layer, self.dv)
        yield TensorSpec(Key("delta_out", layer), (hidden, narrow), cols=values)

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """Return the part of a sequence that a layer keeps on the rank at `place`: convolution rows, heads' states."""
        keys, heads = self._counts(place, block)
        channels = 2 * keys * self.dk + heads * self.dv
        return (kept_state(self.taps, channels, heads, self.dk, self.dv),)

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most: around the convolutions, gates, output, and products' inputs."""
        keys, heads = self._counts(place, block)
        widest = 4 * (4 * keys * self.dk + 4 * heads * self.dv + 2 * heads)
        return widest + int(copied * (hidden + heads * self.dv))

    def compute(self, given: MixerInput) -> tuple[Floats, Floats | None]:
        """Return the output of all shards for x [m, hidden]; no bias is left to add."""
        return recur(self, given)

    def kernel(
        self, page: Page, norm: kernels.Norm | None, place: Place, block: int
    ) -> kernels.GatedDeltaNet:
        """Return the kernels' operation of a loaded page, whose memory it refers to; `norm` is that of its input."""
        units, stored = self.heads(block).units(place), page.vector("delta_rates")
        if self.tiled:
            key_of_head = np.array(units, np.int32) % self.n_keys
        else:
            key_of_head = np.arange(len(units) * self.share, dtype=np.int32) // self.share
        q, k, v, gate, beta, alpha, out = (
            page.matrix(f"delta_{name}") for name in ("q", "k", "v", "gate", "beta", "alpha", "out")
        )
        return kernels.GatedDeltaNet(
            q,
            k,
            v,
            gate,
            beta,
            alpha,
            out,
            tuple(taps_first(page, f"delta_{name}_conv", self.taps) for name in "qkv"),
            -lanes.exp(stored) if self.log_rates else stored,
            page.vector("delta_dt_bias"),
            key_of_head,
            self.dk,
            self.dv,
            self.out_norm.kernel(page, "delta_norm"),
            norm=norm,
        )

    def _counts(self, place: Place, block: int) -> tuple[int, int]:
        """Return the key heads and the heads of the rank at `place`."""
        units = len(self.heads(block).units(place))
        return (self.n_keys if self.tiled else units), units * self.share
