"""Mamba-2, the token mixer whose heads keep a state that decays as each token says.

(Dao and Gu, Transformers are SSMs, 2024; layers of Granite 4, Falcon-H1, Nemotron-H and Bamba.) Rows pass one after
the other in one fixed order of operations, also in prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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

# The roles of what products with a row have added to them.
_BIASES = {
    **{f"mamba_{name}": f"mamba_{name}_bias" for name in ("gate", "x", "b", "c")},
    "mamba_dt": "mamba_dt_proj_bias",
}


@dataclass(frozen=True)
class Scales:
    """The factors of the products with a row: muP's factors in Falcon-H1."""

    gate: float = 1.0
    x: float = 1.0
    b: float = 1.0
    c: float = 1.0
    dt: float = 1.0


@dataclass(frozen=True)
class Mamba2Spec:
    """n_heads heads of `dv` dimensions with states of [dk, dv]; b and c, dk wide, are shared in n_groups groups.

    The convolutions see `taps` rows. `out_norm` is applied to each group's columns, after the gate or, without
    `gate_first`, before it. `dt_range` bounds the steps. With `in_bias` the products with a row have biases, which
    are multiplied by `bias_scale`, and with `out_bias` the output has one. `log_rates`: the tensor has logarithms of
    the rates, else the negative rates. Shards cut heads, or whole groups if those are normalised; if there is only one
    group to be normalised, every shard computes all of it.
    """

    n_groups: int
    n_heads: int
    dk: int
    dv: int
    taps: int
    out_norm: NormSpec | None
    gate_first: bool = True
    conv_bias: bool = True
    dt_range: tuple[float, float] = (0.0, float("inf"))
    scales: Scales = Scales()
    log_rates: bool = True
    in_bias: bool = False
    out_bias: bool = False
    bias_scale: float = 1.0

    fused = False
    adaptable = ()
    turn = None

    @property
    def whole(self) -> bool:
        """Whether every shard has all heads."""
        return self.out_norm is not None and self.n_groups == 1

    def heads(self, block: int) -> Axis:
        """Return the axis of dimensions that are cut together: a head's, or a group's."""
        per_group = self.n_heads // self.n_groups
        if self.out_norm:
            return axis(self.n_groups, per_group * self.dv, block)
        return axis(self.n_heads, self.dv, block)

    def axes(self, block: int) -> tuple[Axis, ...]:
        """Return the axes that limit the number of shards; `block` as in `grid.axis`."""
        return () if self.whole else (self.heads(block),)

    def tensors(self, layer: int, hidden: int, block: int) -> Iterator[TensorSpec]:
        """Yield the tensors of the mixer in a layer, in the order of a page."""
        wide, groups = self.n_heads * self.dv, self.n_groups * self.dk
        values, each, shared = self._axes(block)
        for role, width, rows in (
            ("mamba_gate", wide, values),
            ("mamba_x", wide, values),
            ("mamba_b", groups, shared),
            ("mamba_c", groups, shared),
            ("mamba_dt", self.n_heads, each),
        ):
            yield TensorSpec(Key(role, layer), (width, hidden), rows)
            if self.in_bias:
                yield TensorSpec(Key(_BIASES[role], layer), (width,), rows)
        convolved = [("mamba_x", wide, values), ("mamba_b", groups, shared), ("mamba_c", groups, shared)]
        yield from convolutions(
            layer, self.taps, [(f"{role}_conv", width, rows) for role, width, rows in convolved]
        )
        if self.conv_bias:
            for role, width, rows in convolved:
                yield TensorSpec(Key(f"{role}_conv_bias", layer), (width,), rows)
        for role in ("mamba_rates", "mamba_dt_bias", "mamba_skip"):
            yield TensorSpec(Key(role, layer), (self.n_heads,), each)
        if self.out_norm:
            yield TensorSpec(Key("mamba_norm", layer), (wide,), values)
        yield TensorSpec(Key("mamba_out", layer), (hidden, wide), cols=values)
        if self.out_bias:
            yield TensorSpec(Key("mamba_out_bias", layer), (hidden,))

    def cache(self, place: Place, block: int) -> tuple[LayerCache, ...]:
        """Return the part of a sequence that a layer keeps on the rank at `place`: convolution rows, heads' states."""
        heads, groups = (len(own) for own in self._own(place, block))
        channels = heads * self.dv + 2 * groups * self.dk
        return (kept_state(self.taps, channels, heads, self.dk, self.dv),)

    def row_nbytes(self, place: Place, block: int, hidden: int, copied: float) -> int:
        """Return bytes that a row takes at most: around the convolutions, gates, output, and products' inputs."""
        heads, groups = (len(own) for own in self._own(place, block))
        widest = 4 * (4 * groups * self.dk + 4 * heads * self.dv + 2 * heads)
        return widest + int(copied * (hidden + heads * self.dv))

    def compute(self, given: MixerInput) -> tuple[Floats, Floats | None]:
        """Return the output of all shards for x [m, hidden], and the output's bias."""
        return recur(self, given, not self.whole, "mamba_out_bias" if self.out_bias else "")

    def kernel(self, page: Page, norm: kernels.Norm | None, place: Place, block: int) -> kernels.Mamba2:
        """Return the kernels' operation of a loaded page, whose memory it refers to; `norm` is that of its input."""
        (heads, groups), scales = self._own(place, block), self.scales
        gate, x, b, c, dt, out = (
            page.matrix(f"mamba_{name}") for name in ("gate", "x", "b", "c", "dt", "out")
        )
        convs, stored = [], page.vector("mamba_rates")
        for name, scale in (("x", scales.x), ("b", scales.b), ("c", scales.c)):
            convs.append(taps_first(page, f"mamba_{name}_conv", self.taps) * np.float32(scale))
        group_of_head = np.array(heads, np.int32) // (self.n_heads // self.n_groups) - groups.start
        biases = [page.vector(f"mamba_{name}_conv_bias") if self.conv_bias else None for name in "xbc"]
        biased, dt_bias = self._input_biases(page)
        return kernels.Mamba2(
            gate,
            x,
            b,
            c,
            dt,
            out,
            convs,
            -lanes.exp(stored) if self.log_rates else stored,
            dt_bias,
            page.vector("mamba_skip"),
            group_of_head.astype(np.int32),
            self.dk,
            self.dv,
            biases=biases,
            out_norms=self._norms(page, len(groups)),
            gate_first=self.gate_first,
            gate_scale=scales.gate,
            dt_scale=scales.dt,
            low=self.dt_range[0],
            high=self.dt_range[1],
            norm=norm,
            **biased,
        )

    def _input_biases(self, page: Page) -> tuple[dict[str, Any], Floats]:
        """Return the kernel's biases of gate, x, b and c, where there are any, and what is added to steps."""
        added: Floats = page.vector("mamba_dt_bias")
        if not self.in_bias:
            return {}, added
        scale = np.float32(self.bias_scale)
        *biases, of_steps = (page.vector(role) * scale for role in _BIASES.values())
        return {"input_biases": biases}, added + of_steps * np.float32(self.scales.dt)

    def _norms(self, page: Page, groups: int) -> list[kernels.Norm]:
        """Return the norms of a rank's groups."""
        if self.out_norm is None:
            return []
        weights = np.split(page.vector("mamba_norm"), groups)
        return [kernels.Norm(len(weight), self.out_norm.eps, weight) for weight in weights]

    def _axes(self, block: int) -> tuple[Axis | None, Axis | None, Axis | None]:
        """Return the axes of values, of heads, and of b and c; none where every shard has all."""
        if self.whole:
            return None, None, None
        values, per_group = self.heads(block), self.n_heads // self.n_groups
        if self.out_norm:
            return values, Axis(values.bounds, per_group), Axis(values.bounds, self.dk)
        return values, Axis(values.bounds), Axis(values.bounds, self.dk, per_group)

    def _own(self, place: Place, block: int) -> tuple[range, range]:
        """Return the heads of the rank at `place`, and their groups."""
        _, each, shared = self._axes(block)
        if each is None or shared is None:
            return range(self.n_heads), range(self.n_groups)
        return each.entries(place), shared.units(place)
