"""The common part of token mixers with a state for each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mpillm import kernels
from mpillm.model.cache_spec import SequenceState
from mpillm.model.layers.mixer import MixerInput
from mpillm.model.layers.rank import Floats
from mpillm.partition.grid import Axis, Place
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key


class _Recurrent(Protocol):
    """A mixer whose kernel takes each sequence's rows through its state in their order."""

    def kernel(self, page: Page, norm: kernels.Norm | None, place: Place, block: int) -> Any:
        """Return the kernels' operation of a loaded page, whose memory it refers to; `norm` is that of its input."""


def recur(
    spec: _Recurrent, given: MixerInput, shared: bool = True, out_bias: str = ""
) -> tuple[Floats, Floats | None]:
    """`Mixer.compute` of a mixer with states; without `shared` each shard makes the whole result.

    `out_bias` is the role of the bias of its output, if it has one.
    """
    rank, layer, page, norm, x, step, cache = given

    def make() -> Any:
        return spec.kernel(page, norm.kernel(page, "attn_norm") if norm else None, rank.place, rank.block)

    part, work = np.empty_like(x), rank.kept(make, "recurrent", layer)
    rank.compute(work, x, cache.states, step.batch.first_rows, step.batch.slots, part)
    if shared:
        rank.group.all_reduce(part)
    return part, page.vector(out_bias) if out_bias else None


def kept_state(taps: int, channels: int, heads: int = 0, dk: int = 0, dv: int = 0) -> SequenceState:
    """Return what is kept of a sequence, in float32: the last rows of convolutions over `channels`, and `heads` states
    [dk, dv]."""
    return SequenceState(4 * ((taps - 1) * channels + kernels.delta_floats(heads, dk, dv)))


def convolutions(
    layer: int, taps: int, parts: Sequence[tuple[str, int, Axis | None]]
) -> Iterator[TensorSpec]:
    """Yield the tensors of short convolutions: a role, the channels, and the axis that shards share, of each."""
    for role, channels, rows in parts:
        entries = rows and Axis(rows.bounds, rows.width * taps, rows.share)
        yield TensorSpec(Key(role, layer), (channels * taps,), entries)


def taps_first(page: Page, role: str, taps: int) -> Floats:
    """Return a convolution [taps, channels] of a loaded page."""
    return np.ascontiguousarray(page.vector(role).reshape(-1, taps).T)
