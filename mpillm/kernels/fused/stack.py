"""What is added to the hidden states, and whole layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from mpillm.kernels.fused.attention import Attention, Pool
from mpillm.kernels.fused.mlp import Mlp
from mpillm.kernels.fused.products import Fused
from mpillm.kernels.types import F32, I32, BlockType, Norm

# Of a step's rows: cos, sin, block, offset, pos, table, table_start.
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
    """Whole layers, whose keys and values lie in these pools: x [m, d] goes through attention and MLP of each.

    Layers may differ in their rope or in the KV blocks that they use: layer i uses rows[places[i]], or rows[0] if
    `places` is None. `between`, if there is one, is called before each layer, for work that must go on meanwhile (the
    compiled kernels take several layers of few rows as one parallel region, and call it before each region).
    `reduce`, if there is one, begins to replace this shard's part [m, d] of what attention or the MLP makes by the sum
    over all shards, and returns what is called before the sum is needed. `lanes` are the first rows of groups of rows,
    and the number of all: while the sums of a lane are under way the next one is computed.
    """

    def __init__(self, layers: Sequence[tuple[Attention, Residual, Mlp, Residual]], kv_type: BlockType,
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
        ends: list[Callable[[], object]] = []  # of the sums that are under way, a lane's each
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
    """Where some of the rows are; all have one table."""
    cos, sin, block, offset, pos, table, start = where
    if cos is not None:
        cos, sin = cos[own], sin[own]
    return cos, sin, block[own], offset[own], pos[own], table, start[own]
