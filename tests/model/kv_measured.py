"""A KV cache of 4 bits whose constants are measured once for a model, for `kv_forms` to simulate.

Keys, less the rotated mean that they have before RoPE, and values, less their mean, are multiplied by a matrix for each
head: their principal axes with regard to what reads them (the covariance of queries, the output matrix), sorted by
variance. Axes of a class have as many bits, are scaled to about equal weight and rotated together, and are rounded on a
trellis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
# Dimensions and their bits, of heads of 64: with a byte for the scale of a row 4.375 bits.
KEYS = ((8, 6), (56, 4))
VALUES = ((16, 5), (48, 4))
SHIFTS = (
    0,
    300,
    700,
    1500,
)  # where keys and queries are also measured, so that slow pairs of RoPE have turned
SKIPPED = 16  # tokens at the beginning of a sequence that are not measured
RIDGE = 1e-3  # of the mean variance, added to each


@functools.cache
def best_levels(count: int) -> F32:
    """The levels with the least squared error for a normal distribution (Lloyd's algorithm)."""
    x = np.linspace(-8, 8, 64001)
    weight = np.exp(-x * x / 2)
    mass, moment = (np.concatenate(([0], np.cumsum(y))) for y in (weight, weight * x))
    levels = np.array([NormalDist(0, math.sqrt(3)).inv_cdf((i + 0.5) / count) for i in range(count)])
    for _ in range(500):
        edges = np.concatenate(([0], np.searchsorted(x, (levels[1:] + levels[:-1]) / 2), [len(x)]))
        levels = np.diff(moment[edges]) / np.diff(mass[edges])
    return levels.astype(np.float32)


@functools.cache
def hadamard(n: int) -> F32:
    """An orthogonal matrix of n rows, a power of two, that is its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(n)).astype(np.float32)


def mixing(n: int) -> F64:
    """An orthogonal matrix of n rows in which each column has entries of about equal size."""
    power = n & -n
    i = np.arange(n // power)
    cosines = np.cos(np.pi * (2 * i + 1) * i[:, None] / (2 * len(i))) * math.sqrt(2 / len(i))
    cosines[0] /= math.sqrt(2)
    return np.kron(hadamard(power).astype(np.float64), cosines)


def on_trellis(x: F32, bits: NDArray[np.int64], weights: F32) -> F32:
    """Round rows [n, dim] on the best path of a trellis, with the best of eight scales for each row.

    A scale takes a byte: it is a power of 2^(1/16).
    """
    power = np.rint(np.log2(np.sqrt((x * x).mean(-1, keepdims=True)) + 1e-9) * 16)
    found, least = np.empty_like(x), np.full(len(x), np.inf, np.float32)
    for more in range(-4, 12, 2):
        scale = np.exp2((power + more) / 16).astype(np.float32)
        rounded, error = best_path(x / scale, bits, weights)
        error *= scale[:, 0] ** 2
        found = np.where((error < least)[:, None], rounded * scale, found)
        least = np.minimum(error, least)
    return found


def best_path(x: F32, bits: NDArray[np.int64], weights: F32) -> tuple[F32, F32]:
    """Round rows [n, dim] of deviation 1 to levels on the best path of a trellis of four states; also their errors.

    (Trellis-coded quantisation: Marcellin and Fischer, 1990.) A dimension of b bits has 2^(b + 1) levels, and every
    fourth one belongs to one of four subsets. With u, u1 and u2 the lowest bits of the codes of this dimension and of
    the two before it, the subset is number 2 (u ^ u2) + u1; the other bits of a code choose a level of the subset.
    """
    rows = np.arange(len(x))
    states = np.arange(4)  # u + 2 u1
    u, u1 = states & 1, states >> 1
    subsets = np.stack((2 * u + u1, 2 * (u ^ 1) + u1))  # by u2
    before = np.stack((u1, u1 + 2))
    cost = np.full((len(x), 4), np.inf, np.float32)
    cost[:, 0] = 0
    found, chosen = [], []
    for dim, of_dim in enumerate(bits):
        # 0.9: a trellis wants levels that lie closer than the best ones without it.
        levels = np.float32(0.9) * best_levels(2 << int(of_dim))
        nearest = np.stack([_nearest(x[:, dim], levels[k::4]) for k in range(4)], 1)
        error = weights[dim] * (nearest - x[:, dim, None]) ** 2
        ways = [cost[:, before[u2]] + error[:, subsets[u2]] for u2 in (0, 1)]
        chosen.append((ways[1] < ways[0]).astype(np.int64))
        cost = np.minimum(*ways)
        found.append(nearest)
    state = cost.argmin(1)
    least = cost[rows, state]
    out = np.empty_like(x)
    for dim in reversed(range(x.shape[1])):
        u2 = chosen[dim][rows, state]
        out[:, dim] = found[dim][rows, subsets[u2, state]]
        state = before[u2, state]
    return out, least


def _nearest(x: F32, levels: F32) -> F32:
    found: F32 = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return found


def ridged(matrix: F64) -> F64:
    return matrix + np.eye(len(matrix)) * (np.trace(matrix) / len(matrix) * RIDGE)


class Coded:
    """How rows of covariance C are stored, of which reading weighs an error d as d' M d."""

    def __init__(self, covariance: F64, metric: F64, classes: tuple[tuple[int, int], ...]) -> None:
        values, vectors = np.linalg.eigh(metric)
        root = (vectors * np.sqrt(values)) @ vectors.T
        variances, vectors = np.linalg.eigh(root @ covariance @ root)
        axes, variances = vectors[:, ::-1].T @ root, variances[::-1]
        parts, weights, begin = [], [], 0
        for dims, _ in classes:
            of = slice(begin, begin + dims)
            begin += dims
            # An axis is divided by the fourth root of its variance, so it counts as its square root after the rotation.
            mean = np.sqrt(variances[of]).mean()
            parts.append(mixing(dims) @ (axes[of] * (variances[of] ** -0.25)[:, None]) / math.sqrt(mean))
            weights += [mean**2] * dims
        matrix = np.concatenate(parts)
        self.matrix = matrix.astype(np.float32)
        self.inverse = np.linalg.inv(matrix).astype(np.float32)
        self.weights = (np.array(weights) / max(weights)).astype(np.float32)
        self.bits = np.repeat([bits for _, bits in classes], [dims for dims, _ in classes])

    def stored(self, x: F32) -> F32:
        """Rows [n, dim] as they are read back."""
        found: F32 = on_trellis(x @ self.matrix.T, self.bits, self.weights) @ self.inverse.T
        return found


def rotated_on_trellis(x: F32) -> F32:
    """Rotate a head's dimensions, then 4 bits on a trellis, and a byte for the scale of a head and token."""
    dim = x.shape[-1]
    rows, bits = x.reshape(-1, dim) @ hadamard(dim), np.full(dim, 4)
    return (on_trellis(rows, bits, np.ones(dim, np.float32)) @ hadamard(dim)).reshape(x.shape)


@dataclass
class Layer:
    """What a layer's attention read of a sequence, without its first tokens: [heads, tokens, dim]; keys before RoPE."""

    q: F32
    k: F32
    v: F32


class Measured:
    """The constants of all layers, from sequences that are computed for them."""

    def __init__(self, rotate: Callable[[F32, NDArray[np.int64]], F32]) -> None:
        self._rotate = rotate
        self._seen: dict[int, list[Layer]] = {}
        self._outputs: dict[int, F64] = {}
        self._keys: dict[int, list[tuple[F32, Coded]]] = {}
        self._values: dict[int, list[tuple[F32, Coded]]] = {}

    def add(self, layer: int, q: F32, k: F32, v: F32, output: F32) -> None:
        """Take q [heads, tokens, dim], k and v [kv heads, tokens, dim], after RoPE, and output [heads * dim, width]."""
        kept = (x[:, SKIPPED:] for x in (q, self._moved(k, -np.arange(k.shape[1])), v))
        self._seen.setdefault(layer, []).append(Layer(*kept))
        self._outputs[layer] = output.astype(np.float64).reshape(len(k), -1, v.shape[-1], output.shape[-1])

    def _moved(self, x: F32, positions: NDArray[np.int64] | int) -> F32:
        return self._rotate(x, np.broadcast_to(positions, x.shape[1]))

    def _means(self, layer: int, kind: str) -> F32:
        """Means of keys or values [kv heads, dim]."""
        found: F32 = np.concatenate([getattr(seen, kind) for seen in self._seen[layer]], 1).mean(1)
        return found

    def _code_keys(self, layer: int, head: int, mean: F32) -> Coded:
        moments, counts = [np.zeros((len(mean),) * 2) for _ in range(2)], [0, 0]
        for seen in self._seen[layer]:
            shared = len(seen.q) // len(seen.k)
            keys = (seen.k[head] - mean)[None]
            rows = (
                self._moved(keys, SKIPPED + np.arange(keys.shape[1])),
                seen.q[head * shared : (head + 1) * shared],
            )
            for at, x in enumerate(rows):
                for shift in SHIFTS:
                    moved = self._moved(x, shift).reshape(-1, len(mean)).astype(np.float64)
                    moments[at] += moved.T @ moved
                    counts[at] += len(moved)
        covariance, metric = (ridged(sums / rows) for sums, rows in zip(moments, counts, strict=True))
        return Coded(covariance, metric, KEYS)

    def _code_values(self, layer: int, head: int, mean: F32) -> Coded:
        rows = np.concatenate([seen.v[head] for seen in self._seen[layer]]).astype(np.float64) - mean
        output = self._outputs[layer][head]
        metric = np.einsum("hiw,hjw->ij", output, output)
        return Coded(ridged(rows.T @ rows / len(rows)), ridged(metric), VALUES)

    def keys(self, layer: int, k: F32) -> F32:
        """Keys [kv heads, tokens, dim] as they are read back."""
        if layer not in self._keys:
            means = self._means(layer, "k")
            self._keys[layer] = [
                (mean, self._code_keys(layer, head, mean)) for head, mean in enumerate(means)
            ]
        positions, found = np.arange(k.shape[1]), []
        for (mean, coded), x in zip(self._keys[layer], k, strict=True):
            constant = self._moved(np.broadcast_to(mean, (1, *x.shape)), positions)[0]
            found.append(coded.stored(x - constant) + constant)
        return np.stack(found)

    def values(self, layer: int, v: F32) -> F32:
        """Values [kv heads, tokens, dim] as they are read back."""
        if layer not in self._values:
            means = self._means(layer, "v")
            self._values[layer] = [
                (mean, self._code_values(layer, head, mean)) for head, mean in enumerate(means)
            ]
        return np.stack(
            [coded.stored(x - mean) + mean for (mean, coded), x in zip(self._values[layer], v, strict=True)]
        )
