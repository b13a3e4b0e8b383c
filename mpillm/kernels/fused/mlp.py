"""Multi-layer perceptrons, alone and as experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpillm.kernels.checks import require_activation
from mpillm.kernels.fused.products import Fused, Packed
from mpillm.kernels.types import F32, I32, Activation, Norm


class _MlpMatrices(Fused):
    """gate (or None), up and down, and the activation between them."""

    def __init__(self, gate: Packed | None, up: Packed, down: Packed, biases: tuple[F32 | None, F32 | None] | None,
                 activation: Activation, limit: float, alpha: float) -> None:  # fmt: skip
        self._matrices, self._down, self._biases = (gate, up), down, biases or (None, None)
        self._activation = require_activation(activation, gate is not None, limit), limit, alpha

    def __call__(self, x: F32, out: F32, threads: int, fold: bool) -> None:
        gate, up = (
            self._input(x, matrix, bias, threads)
            for matrix, bias in zip(self._matrices, self._biases, strict=True)
        )
        assert up is not None
        kind, limit, alpha = self._activation
        first, factor = (up, None) if gate is None else (gate, up)
        self.ops.activate(kind, first, factor, first, threads, limit, alpha)
        self._multiply(first, self._down, out, threads, fold)

    def _input(self, x: F32, matrix: Packed | None, bias: F32 | None, threads: int) -> F32 | None:
        if matrix is None:
            return None
        values = self._times(x, matrix, threads)
        if bias is not None:
            values += bias
        return values


class Mlp(Fused):
    """out = down(f(gate(x)) * up(x)) of x [m, d], or down(f(up(x))) without a gate.

    out is [m, d], or the panel sums [P, m, d] with fold=False. `norm` normalises x, each of the `biases` of gate and
    up may be None, and f is the `activation`.
    """

    def __init__(self, gate: Packed | None, up: Packed, down: Packed, *, activation: Activation = Activation.SILU,
                 limit: float = 0.0, alpha: float = 1.702, norm: Norm | None = None,
                 biases: tuple[F32 | None, F32 | None] | None = None) -> None:  # fmt: skip
        self._matrices = _MlpMatrices(gate, up, down, biases, activation, limit, alpha)
        self._norm_before = norm

    def __call__(self, x: F32, out: F32, threads: int = 1, fold: bool = True) -> None:
        self._matrices.ops = self.ops
        self._matrices(self._norm(x, self._norm_before, threads), out, threads, fold)


class Expert:
    """The matrices of one of the `Experts` and their biases; only the shard with panel 0 has `down_bias`."""

    def __init__(self, gate: Packed | None, up: Packed, down: Packed, *,
                 biases: tuple[F32 | None, F32 | None] | None = None,
                 down_bias: F32 | None = None) -> None:  # fmt: skip
        self.matrices, self.biases, self.down_bias = (gate, up, down), biases, down_bias


class Experts(Fused):
    """Add the weighted outputs of experts for rows of h [m, k], C-contiguous, to panel sums [P, m, d].

    Expert i computes the rows `at[starts[i]:starts[i + 1]]`, at least one, with the weights at the same places. Outputs
    are added in the order of the experts, the bias of an expert's down before its product. The caller folds the panels
    after the last expert, so that the sums do not depend on the number of shards.
    """

    def __init__(self, experts: Sequence[Expert], *, activation: Activation = Activation.SILU, limit: float = 0.0,
                 alpha: float = 1.702) -> None:  # fmt: skip
        self._experts, self._activation = experts, (activation, limit, alpha)

    def __call__(self, h: F32, at: I32, starts: I32, weights: F32, panels: F32, threads: int = 1) -> None:
        for expert, begin, end in zip(self._experts, starts[:-1], starts[1:], strict=True):
            matrices = _MlpMatrices(*expert.matrices, expert.biases, *self._activation)
            matrices.ops = self.ops
            rows, share = at[begin:end], weights[begin:end, None]
            sums = np.empty((len(panels), len(rows), panels.shape[2]), np.float32)
            matrices(np.ascontiguousarray(h[rows]), sums, threads, False)
            if expert.down_bias is not None:
                panels[0, rows] += share * expert.down_bias
            panels[:, rows] += share * sums
