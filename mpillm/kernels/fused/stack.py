"""The addition to the hidden states, and whole layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from mpillm.kernels.fused.attention import Attention, Pool
from mpillm.kernels.fused.mlp import Mlp
from mpillm.kernels.fused.products import Fused
from mpillm.kernels.types import F32, I32, KvType, Norm

# The arguments of a step's rows: cos, sin, block, offset, pos, table, table_start.
Where = tuple[F32, F32, I32, I32, I32, I32, I32]


class Residual(Fused):
    """x [m, d] += scale * norm(part + bias), where `part` is already the sum over shards; it may be overwritten."""

    def __init__(self, bias: F32 | None = None, norm: Norm | None = None, scale: float = 1.0) -> None:
        self._bias, self._norm_after, self._scale = bias, norm, np.float32(scale)

    def __call__(self, x: F32, part: F32, threads: int = 1) -> None:
        if self._bias is not None:
            part += self._bias
        x += self._scale * self._norm(part, self._norm_after, threads)


class LayerStack:
    """Several layers: computes attention and MLP of each on x [m, d], in place; `pools` hold their keys and values.

    Layers may differ in their RoPE or in the KV blocks that they use: layer i uses rows[places[i]], or rows[0] if
    `places` is None. `between` is called before each layer, so that the caller can make progress with other work (the
    compiled kernels compute several layers of few rows in one parallel region, and call it before each region).
    `reduce(part, lane)` starts the sum of this shard's part [m, d] over all shards, in place, and returns a function
    that waits for it. `lanes` [lanes + 1] are the first rows of the lanes, and m: while the sums of one lane are under
    way the next lane is computed.
    """

    def __init__(self, layers: Sequence[tuple[Attention, Residual, Mlp, Residual]], kv_type: KvType,
                 pools: Sequence[tuple[Pool, ...]], places: Sequence[int] | None = None) -> None:  # fmt: skip
        self._layers = list(zip(layers, pools, [0] * len(layers) if places is None else places, strict=True))
        self._kv_type = kv_type

    def __call__(
        self,
        x: F32,
        rows: Sequence[Where],
        between: Callable[[], object] | None,
        reduce: Callable[[F32, int], Callable[[], object]] | None,
        threads: int = 1,
        lanes: Sequence[int] | None = None,
    ) -> None:
        part = np.empty_like(x)
        reduce = reduce or (lambda part, lane: lambda: None)
        slices = [slice(*ends) for ends in pairwise([0, len(x)] if lanes is None else lanes)]
        ends: list[Callable[[], object]] = []  # each waits for the sum of one lane
        before: Residual | None = None
        for (attention, after_attention, mlp, after_mlp), (kpool, vpool), place in self._layers:
            if between is not None:
                between()
            for lane, own in enumerate(slices):
                if before is not None:
                    ends.pop(0)()
                    before(x[own], part[own], threads)
                where = _of_lane(rows[place], own)
                attention(x[own], *where[:2], self._kv_type, kpool, vpool, *where[2:], part[own], threads)
                ends.append(reduce(part[own], lane))
            for lane, own in enumerate(slices):
                ends.pop(0)()
                after_attention(x[own], part[own], threads)
                mlp(x[own], part[own], threads)
                ends.append(reduce(part[own], lane))
            before = after_mlp
        for own, end in zip(slices, ends, strict=True):
            end()
            assert before is not None
            before(x[own], part[own], threads)


def _of_lane(where: Where, own: slice) -> Where:
    """Return the arguments of the rows `own`; the table is shared by all rows."""
    cos, sin, block, offset, pos, table, start = where
    if cos is not None:
        cos, sin = cos[own], sin[own]
    return cos, sin, block[own], offset[own], pos[own], table, start[own]
