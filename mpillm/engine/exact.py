"""exp and log of float64 arrays with the same bits on every machine.

They use only operations that IEEE 754 defines: additions, multiplications, divisions and powers of two. The C library's
functions differ in the last bit between versions and instruction sets. Formulas and constants are those of fdlibm
(Sun Microsystems 1993, e_exp.c and e_log.c); errors are below one unit in the last place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_PER_LN2 = 1.44269504088896338700
_LOWEST = -745.2  # exp of smaller arguments is 0
_SQRT_HALF = 0.70710678118654752440
_EXP = (
    4.13813679705723846039e-08, -1.65339022054652515390e-06, 6.61375632143793436117e-05,
    -2.77777777770155933842e-03, 1.66666666666666019037e-01,
)  # fmt: skip
_LOG = (
    1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01,
    2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01,
)  # fmt: skip


def _polynomial(x: Doubles, coefficients: tuple[float, ...]) -> Doubles:
    """Return x times the polynomial with these coefficients; that of the highest power comes first."""
    total = x * coefficients[0]
    for coefficient in coefficients[1:]:
        total += coefficient
        total *= x
    return total


def exp(x: Doubles) -> Doubles:
    """Return exp(x) for x <= 709, including -inf."""
    x = np.maximum(x, _LOWEST)
    power = np.rint(x * _PER_LN2)
    high, low = x - power * _LN2_HIGH, power * _LN2_LOW
    r = high - low
    c = r - _polynomial(r * r, _EXP)
    y: Doubles = np.ldexp(1.0 - ((low - (r * c) / (2.0 - c)) - high), power.astype(np.int32))
    return y


def log(x: Doubles) -> Doubles:
    """Return the natural logarithm of finite x > 0."""
    fraction, power = np.frexp(x)
    small = fraction < _SQRT_HALF
    f = np.where(small, 2.0 * fraction, fraction) - 1.0
    k = (power - small).astype(np.float64)
    s = f / (2.0 + f)
    half = 0.5 * f * f
    y: Doubles = k * _LN2_HIGH - ((half - (s * (half + _polynomial(s * s, _LOG)) + k * _LN2_LOW)) - f)
    return y
