"""What is added to the hidden states, and whole layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    `reduce`, if there is one, replaces this shard's part [m, d] of what attention or the MLP makes by the sum over all
    shards.
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
        reduce: Callable[[F32], object] | None,
        threads: int = 1,
    ) -> None:
        part = np.empty_like(x)
        for (attention, after_attention, mlp, after_mlp), (kpool, vpool), place in self._layers:
            if between is not None:
                between()
            attention(x, *rows[place][:2], self._kv_type, kpool, vpool, *rows[place][2:], part, threads)
            if reduce is not None:
                reduce(part)
            after_attention(x, part, threads)
            mlp(x, part, threads)
            if reduce is not None:
                reduce(part)
            after_mlp(x, part, threads)
