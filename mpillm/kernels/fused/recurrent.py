"""Token mixers with a state for each sequence."""

from __future__ import annotations

import numpy as np

from mpillm.kernels.fused.products import Fused, Packed
from mpillm.kernels.types import F32, I32, Activation, Norm


class GatedDeltaNet(Fused):
    """out [m, d] = o(norm(delta rule(q, k, v)) * silu(gate)) of x [m, d], which `norm` normalises first.

    q, k and v pass a convolution of a few taps with SiLU: `convs` are the three, [taps, channels]. q and k are then
    divided by their lengths (`eps` is added to the squares), q by sqrt(dk) too. A head's state decays by
    e^(rates * softplus(alpha(x) + dt_bias)), and sigmoid(beta(x)) says how much of it is written over. `out_norm`, dv
    wide, normalises each head. `states` f32 [slot, floats] begin with the last rows before the convolutions, q's, k's
    and v's, each [taps - 1, channels]; then come the heads' states (`reference.delta_rule`).
    """

    def __init__(self, q: Packed, k: Packed, v: Packed, gate: Packed, beta: Packed, alpha: Packed, o: Packed,
                 convs: tuple[F32, F32, F32], rates: F32, dt_bias: F32, key_of_head: I32, dk: int, dv: int,
                 out_norm: Norm, *, norm: Norm | None = None, eps: float = 1e-6) -> None:  # fmt: skip
        self._inputs, self._o, self._convs = (q, k, v, gate, beta, alpha), o, convs
        self._rates, self._dt_bias, self._key_of_head = rates, dt_bias, key_of_head
        self._dk, self._dv, self._out_norm, self._norm_before, self._eps = dk, dv, out_norm, norm, eps

    def __call__(self, x: F32, states: F32, first_rows: I32, slots: I32, out: F32, threads: int = 1) -> None:
        ops, dk, begin = self.ops, self._dk, 0
        rows = self._norm(x, self._norm_before, threads)
        *qkv, gate, beta, decay = (self._times(rows, matrix, threads) for matrix in self._inputs)
        for i, w in enumerate(self._convs):
            convolved, floats = np.empty_like(qkv[i]), (len(w) - 1) * w.shape[1]
            ops.short_conv(qkv[i], w, None, states[:, begin : begin + floats], first_rows, slots, convolved, True,
                           threads)  # fmt: skip
            qkv[i], begin = convolved, begin + floats
        ops.activate(Activation.SIGMOID, beta, None, beta, threads)
        ops.decays(decay, self._rates, self._dt_bias, threads)
        # x / sqrt(sum(x^2) + eps) is the RMS norm with eps / dk, over sqrt(dk); q is divided by another sqrt(dk).
        q, k = (
            self._norm_heads(part, Norm(dk, self._eps / dk, np.full(dk, scale, np.float32)), 1, threads)
            for part, scale in zip(qkv[:2], (1 / dk, dk**-0.5), strict=True)
        )
        made = np.empty_like(qkv[2])
        ops.delta_rule(q, k, qkv[2], decay, beta, states[:, begin:], first_rows, slots, self._key_of_head, dk,
                       self._dv, made, threads)  # fmt: skip
        made = self._norm_heads(made, self._out_norm, 1, threads)
        ops.activate(Activation.SILU, gate, made, made, threads)
        self._multiply(made, self._o, out, threads)
