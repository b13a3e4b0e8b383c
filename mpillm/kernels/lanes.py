"""Float32 arithmetic of the kernels in NumPy: fused multiply-add, 16-lane sums, panel trees, exp, tanh, erfc.

The order of operations in NumPy's own sums, in BLAS and in exp may depend on shape, stride or the number of threads. It
is fixed in these functions, so that a row's result does not depend on the other rows of its batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.kernels.types import F32, TILE_ROWS

Real = npt.NDArray[Any] | np.float32 | float

# exp(r) on |r| <= ln(2)/2: r + r^2 P(r), Cephes' expf.  The same constants are in cython/core/vec_common.h.
LOG2E = np.float32(1.44269504088896341)
LN2_HI = np.float32(0.693359375)
LN2_LO = np.float32(-2.12194440e-4)
EXP_POLY = tuple(np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2,
                                         1.6666665459e-1, 5.0000001201e-1))  # fmt: skip
EXP_LOW, EXP_HIGH = np.float32(-105.0), np.float32(89.0)
TANH_POLY = tuple(np.float32(c) for c in (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1,
                                          -3.33332819422e-1))  # fmt: skip
ERFC_POLY = tuple(np.float32(c) for c in (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806,
                                          0.09678418, 0.37409196, 1.00002368, -1.26551223))  # fmt: skip


def fma(a: Real, b: Real, c: Real) -> F32:
    """Return a * b + c in float32, computed in float64; it differs from an fma only where rounding twice matters."""
    with np.errstate(all="ignore"):
        product = np.multiply(a, b, dtype=np.float64)
        product = product + c
        return product.astype(np.float32)


def exp(x: F32) -> F32:
    """Return e**x within 2 ulp; NaN stays NaN, overflow gives inf, underflow gives denormals and then 0."""
    with np.errstate(all="ignore"):
        x = np.where(x > EXP_HIGH, EXP_HIGH, np.where(x < EXP_LOW, EXP_LOW, x)).astype(np.float32)
        n = np.rint(x * LOG2E)
        r = fma(n, -LN2_LO, fma(n, -LN2_HI, x))
        p = np.full_like(r, EXP_POLY[0])
        for c in EXP_POLY[1:]:
            p = fma(p, r, c)
        y = fma(p, r * r, r) + np.float32(1)
        power = np.nan_to_num(n).astype(np.int32)
        half = power >> 1
        result: F32 = np.ldexp(np.ldexp(y, half), power - half)
    return result


def tanh(x: F32) -> F32:
    """Return tanh(x) within 2 ulp: a polynomial below 0.625 (Cephes' tanhf), else 1 - 2 / (e^2x + 1)."""
    with np.errstate(all="ignore"):
        size, square = np.abs(x), x * x
        p = np.full_like(x, TANH_POLY[0])
        for c in TANH_POLY[1:]:
            p = fma(p, square, c)
        near = fma(p * square, x, x)
        far = np.float32(1) - np.float32(2) / (exp(size + size) + np.float32(1))
        result: F32 = np.where(size > np.float32(0.625), np.where(x < 0, np.float32(0) - far, far), near)
    return result


def normal(x: F32) -> F32:
    """Return the normal distribution function, erfc(-x / sqrt(2)) / 2; its relative error is below 1e-6 for x > -12.

    erfc(z) = t e^(-z^2 + P(t)), t = 1 / (1 + z / 2), for z >= 0 (Press et al., Numerical Recipes in C, 6.2).
    """
    with np.errstate(all="ignore"):
        z = np.abs(x) * np.float32(0.70710678118654752)
        t = np.float32(1) / fma(z, np.float32(0.5), np.float32(1))
        p = np.full_like(x, ERFC_POLY[0])
        for c in ERFC_POLY[1:]:
            p = fma(p, t, c)
        tail = (t * np.float32(0.5)) * exp(p - z * z)
        result: F32 = np.where(x > 0, np.float32(1) - tail, tail)
    return result


def tree(x: F32) -> F32:
    """Sum over the first axis, whose length is a power of two, as ((x0 + x1) + (x2 + x3)) + ..."""
    with np.errstate(all="ignore"):
        while len(x) > 1:
            x = x[0::2] + x[1::2]
    result: F32 = x[0]
    return result


def halves(lanes: F32, op: Any) -> F32:
    """Reduce the last axis of 16 lanes with `op`: lane j and lane j + 8, then + 4, + 2, + 1."""
    width = lanes.shape[-1]
    with np.errstate(all="ignore"):
        while width > 1:
            width //= 2
            lanes = op(lanes[..., :width], lanes[..., width : 2 * width])
    result: F32 = lanes[..., 0]
    return result


def _blocks(x: F32, fill: float) -> F32:
    """Return x [m, d] as [ceil(d / 16), m, 16], padded with `fill`."""
    m, d = x.shape
    count = -(-d // TILE_ROWS)
    padded: F32 = np.full((m, count * TILE_ROWS), fill, np.float32)
    padded[:, :d] = x
    blocks: F32 = padded.reshape(m, count, TILE_ROWS).transpose(1, 0, 2)
    return blocks


def lane_sum(x: F32, squares: bool = False) -> F32:
    """Sum each row of x [m, d], or its squares, in 16 lanes."""
    acc = np.zeros((len(x), TILE_ROWS), np.float32)
    with np.errstate(all="ignore"):
        for part in _blocks(x, 0.0):
            acc = fma(part, part, acc) if squares else acc + part
    return halves(acc, np.add)


def lane_max(x: F32) -> F32:
    """Return the maximum of each row of x [m, d], or -inf if d = 0; a NaN may be ignored (softmax propagates it)."""
    acc = np.full((len(x), TILE_ROWS), -np.inf, np.float32)
    for part in _blocks(x, -np.inf):
        acc = _larger(acc, part)
    return halves(acc, _larger)


def _larger(a: F32, b: F32) -> F32:
    larger: F32 = np.where(a > b, a, b)
    return larger
