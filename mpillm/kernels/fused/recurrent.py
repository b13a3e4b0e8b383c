"""Token mixers with a state for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpillm.kernels.fused.products import Fused, Packed
from mpillm.kernels.types import F32, I32, Activation, Norm


def _convolve(ops: Any, parts: list[F32], convs: Sequence[F32], biases: Sequence[F32 | None], states: F32,
              first_rows: I32, slots: I32, threads: int) -> int:  # fmt: skip
    """Replace each part by its convolution, followed by SiLU; return the offset of what follows in the states."""
    begin = 0
    for i, (w, bias) in enumerate(zip(convs, biases, strict=True)):
        convolved, floats = np.empty_like(parts[i]), (len(w) - 1) * w.shape[1]
        tails = states[:, begin : begin + floats]
        ops.short_conv(parts[i], w, bias, tails, first_rows, slots, convolved, True, threads)
        parts[i], begin = convolved, begin + floats
    return begin


class GatedDeltaNet(Fused):
    """out [m, d] = o(norm(delta rule(q, k, v)) * silu(gate)) of x [m, d], which `norm` normalises first.

    The three convolutions `convs` [taps, channels], followed by SiLU, are applied to q, k and v. q and k are divided by
    their L2 norms (`eps` is added to the sums of squares), and q by sqrt(dk) too. A head's state decays by
    e^(rates * softplus(alpha(x) + dt_bias)), and its update is weighted by sigmoid(beta(x)). `out_norm`, dv wide,
    normalises each head. `states` f32 [slot, floats] begin with the last inputs of the convolutions of q, k and v, each
    [taps - 1, channels]; the heads' states follow (`reference.delta_rule`).
    """

    def __init__(self, q: Packed, k: Packed, v: Packed, gate: Packed, beta: Packed, alpha: Packed, o: Packed,
                 convs: Sequence[F32], rates: F32, dt_bias: F32, key_of_head: I32, dk: int, dv: int,
                 out_norm: Norm, *, norm: Norm | None = None, eps: float = 1e-6) -> None:  # fmt: skip
        self._inputs, self._o, self._convs = (q, k, v, gate, beta, alpha), o, convs
        self._rates, self._dt_bias, self._key_of_head = rates, dt_bias, key_of_head
        self._dk, self._dv, self._out_norm, self._norm_before, self._eps = dk, dv, out_norm, norm, eps

    def __call__(self, x: F32, states: F32, first_rows: I32, slots: I32, out: F32, threads: int = 1) -> None:
        ops, dk = self.ops, self._dk
        rows = self._norm(x, self._norm_before, threads)
        *qkv, gate, beta, decay = (self._times(rows, matrix, threads) for matrix in self._inputs)
        begin = _convolve(ops, qkv, self._convs, (None,) * 3, states, first_rows, slots, threads)
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


class Mamba2(Fused):
    """out [m, d] = o(norm(scan(c, b, x) * silu(gate_scale * gate))) of rows [m, d], which `norm` normalises first.

    `input_biases` are added to the products gate, x, b and c. The three convolutions `convs` [taps, channels] with
    `biases`, followed by SiLU, are applied to x, b and c. A head's step is softplus(dt_scale * dt + dt_bias), limited
    to low .. high; its state decays by e^(rates * step), and skip * x is added to its output
    (`reference.selective_scan`).
    `out_norms`, if any, normalise equal groups of columns, after the gate if `gate_first`, else before it. `states` f32
    [slot, floats] begin with the last inputs of the convolutions of x, b and c, each [taps - 1, channels]; the heads'
    states follow. (Dao and Gu, Transformers are SSMs, 2024.)
    """

    def __init__(self, gate: Packed, x: Packed, b: Packed, c: Packed, dt: Packed, o: Packed,
                 convs: Sequence[F32], rates: F32, dt_bias: F32, skip: F32, group_of_head: I32, dk: int, dv: int,
                 *, biases: Sequence[F32 | None] = (None, None, None), out_norms: Sequence[Norm] = (),
                 gate_first: bool = True, gate_scale: float = 1.0, dt_scale: float = 1.0, low: float = 0.0,
                 high: float = np.inf, norm: Norm | None = None,
                 input_biases: Sequence[F32 | None] = (None,) * 4) -> None:  # fmt: skip
        self._input_biases = (*input_biases, None)
        self._inputs, self._o, self._convs, self._biases = (gate, x, b, c, dt), o, convs, biases
        self._rates, self._dt_bias, self._skip, self._group_of_head = rates, dt_bias, skip, group_of_head
        self._dk, self._dv, self._out_norms, self._gate_first = dk, dv, out_norms, gate_first
        self._gate_scale, self._dt_scale, self._low, self._high = gate_scale, dt_scale, low, high
        self._norm_before = norm

    def __call__(self, x: F32, states: F32, first_rows: I32, slots: I32, out: F32, threads: int = 1) -> None:
        ops = self.ops
        rows = self._norm(x, self._norm_before, threads)
        gate, *xbc, decay = self._biased(rows, self._inputs, self._input_biases, threads)
        begin = _convolve(ops, xbc, self._convs, self._biases, states, first_rows, slots, threads)
        step, made = np.empty_like(decay), np.empty_like(xbc[0])
        ops.decays(decay, self._rates, self._dt_bias, threads, step, self._dt_scale, self._low, self._high)
        ops.selective_scan(xbc[2], xbc[1], xbc[0], decay, step, self._skip, states[:, begin:], first_rows, slots,
                           self._group_of_head, self._dk, self._dv, made, threads)  # fmt: skip
        if self._gate_first:
            self._gated(gate, made, threads)
        for i, norm in enumerate(self._out_norms):
            columns = slice(i * norm.width, (i + 1) * norm.width)
            made[:, columns] = self._norm(np.ascontiguousarray(made[:, columns]), norm, threads)
        if not self._gate_first:
            self._gated(gate, made, threads)
        self._multiply(made, self._o, out, threads)

    def _gated(self, gate: F32, made: F32, threads: int) -> None:
        self.ops.activate(Activation.SILU_SCALED, gate, made, made, threads, 0.0, self._gate_scale)


class GatedConvolution(Fused):
    """out [m, d] = o(c(x) * conv(b(x) * v(x))) of rows x [m, d], which `norm` normalises first.

    `w` [taps, channels] is a causal convolution of each channel, as in LFM2. `states` f32 [slot, floats] have its last
    inputs, [taps - 1, channels]. Each of the `biases` of b, c and v may be None.
    """

    def __init__(
        self, b: Packed, c: Packed, v: Packed, o: Packed, w: F32, *, norm: Norm | None = None,
        biases: Sequence[F32 | None] = (None,) * 3, conv_bias: F32 | None = None,
    ) -> None:  # fmt: skip
        self._inputs, self._o, self._w, self._norm_before = (b, c, v), o, w, norm
        self._biases, self._conv_bias = biases, conv_bias

    def __call__(self, x: F32, states: F32, first_rows: I32, slots: I32, out: F32, threads: int = 1) -> None:
        rows = self._norm(x, self._norm_before, threads)
        b, c, v = self._biased(rows, self._inputs, self._biases, threads)
        self.ops.activate(Activation.IDENTITY, b, v, v, threads)
        made = np.empty_like(v)
        self.ops.short_conv(v, self._w, self._conv_bias, states, first_rows, slots, made, False, threads)
        self.ops.activate(Activation.IDENTITY, c, made, made, threads)
        self._multiply(made, self._o, out, threads)
