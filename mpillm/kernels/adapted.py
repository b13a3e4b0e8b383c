"""Parts of layers with adapted matrices, in Python over the single kernels of the path in use.

The attribute `low` of a matrix lists its adapters. Each adds b(a(row)) to the product of some rows (LoRA, arXiv
2106.09685). The other rows get the same bits as without adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpillm import kernels
from mpillm.kernels import fused
from mpillm.kernels.fused.products import Fused, Packed
from mpillm.kernels.types import F32, I32

WORTH_THREADS = 2**20  # multiplications; below this, starting threads takes longer than the product


class LowRank(NamedTuple):
    """An adapter of rank r of a matrix [n, k] for the rows `rows` of a step.

    a [r, k] has the column panels of the matrix, or one if shards share its rows, b [n, r] the same rows.
    """

    rows: I32
    a: Packed
    b: Packed


class _Adapted(Fused):
    ops = kernels

    def _multiply(self, x: F32, matrix: Packed, out: F32, threads: int, fold: bool = True) -> None:
        low: Sequence[LowRank] = getattr(matrix, "low", ())
        panels = len(low[0].a.bounds) - 1 if low else 0
        if not low:
            super()._multiply(x, matrix, out, threads, fold)
        elif panels == 1:
            super()._multiply(x, matrix, out, threads, fold)
            self._add(x, low, out if out.ndim == 3 else out[None], threads)
        else:
            # Panels are folded afterwards, so that the sums do not depend on the number of shards that hold them.
            sums = np.empty((panels, len(x), matrix.n), np.float32) if fold else out
            super()._multiply(x, matrix, sums, threads, fold=False)
            self._add(x, low, sums, threads)
            if fold:
                self.ops.fold(sums, out, threads)

    def _add(self, x: F32, low: Sequence[LowRank], sums: F32, threads: int) -> None:
        """Add the adapters' products to the panel sums [P, m, n]."""
        for rows, a, b in low:
            inner = np.empty((len(sums), len(rows), a.n), np.float32)
            used = threads if len(rows) * a.n * (a.k + len(sums) * b.n) >= WORTH_THREADS else 1
            self._product(x[rows], a, inner, used, fold=False)
            sums[:, rows] += self._times(inner.reshape(-1, a.n), b, used).reshape(len(sums), len(rows), b.n)


class AdaptedAttention(_Adapted, fused.Attention):
    """`kernels.Attention` whose matrices may be adapted."""


class AdaptedLatentAttention(_Adapted, fused.LatentAttention):
    """`kernels.LatentAttention` whose matrices may be adapted, except k_b and v_b."""


class AdaptedProducts(_Adapted, fused.Products):
    """`kernels.Products` whose matrices may be adapted."""
