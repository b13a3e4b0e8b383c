"""Counter-based random numbers: Philox4x64-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

The numbers equal those of NumPy's `Generator(Philox(key=key, counter=n)).random()`, which takes longer to construct
than to draw one.
"""

from __future__ import annotations

_WORD = (1 << 64) - 1
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def uniform(key: tuple[int, int], counter: int) -> float:
    """Return the number in [0, 1) for a key of two 64-bit words and a counter."""
    k0, k1 = key
    a, b, c, d = counter + 1, 0, 0, 0
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (second >> 64) ^ b ^ k0, second & _WORD, (first >> 64) ^ d ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return (a >> 11) * 2.0**-53
