"""Operations on rows: sums, norms, activations, sampling; see `reference` for how results compare."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from mpillm.kernels import lanes
from mpillm.kernels.checks import (
    require,
    require_activation,
    require_cap,
    require_rows,
    require_vector,
    rotary_of,
)
from mpillm.kernels.types import (
    F32,
    I32,
    Activation,
)


def fold(parts: F32, out: F32, threads: int = 1) -> None:
    """out [m, d] = ((p0 + p1) + (p2 + p3)) + ... of parts [P, m, d], where P is a power of two."""
    count = len(parts)
    if parts.ndim != 3 or count < 1 or count & (count - 1) or count > 64:
        raise ValueError(f"parts must be [P, m, d] with P a power of two up to 64, not {parts.shape}")
    require("parts", parts, parts.shape, np.float32)
    require_rows("out", out, rows=parts.shape[1], width=parts.shape[2], dtype=np.float32)
    out[:] = lanes.tree(parts)


def square_sums(x: F32, out: F32, threads: int = 1) -> None:
    """out [m] = the sum of squares of each row of x [m, d]."""
    require_rows("x", x, dtype=np.float32)
    require("out", out, (len(x),), np.float32)
    out[:] = lanes.lane_sum(x, squares=True)


def rms_norm(x: F32, w: F32 | None, eps: float, out: F32, threads: int = 1, groups: int = 1) -> None:
    """out = w * x / sqrt(mean(x^2) + eps) of each row; x and out f32 [m, d], w f32 [d] or None for all ones.

    The squares of each of `groups` equal parts of a row are summed separately, and these sums are added in order, so
    that shards that hold some of the parts can exchange `square_sums`.
    """
    require_rows("x", x, dtype=np.float32)
    require_vector("w", w, x.shape[1])
    require_rows("out", out, rows=len(x), width=x.shape[1], dtype=np.float32)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} columns are not {groups} groups")
    with np.errstate(all="ignore"):
        parts = [lanes.lane_sum(part, squares=True) for part in np.split(x, groups, axis=1)]
        mean = functools.reduce(np.add, parts) / np.float32(x.shape[1])
        scaled = x * (np.float32(1) / np.sqrt(mean + np.float32(eps)))[:, None]
        out[:] = scaled if w is None else w * scaled


def layer_norm(x: F32, w: F32 | None, bias: F32 | None, eps: float, out: F32, threads: int = 1) -> None:
    """out = w * (x - mean) / sqrt(variance + eps) + bias of each row.

    x and out are f32 [m, d], w and bias f32 [d]; w None is all ones, bias None all zeros.
    """
    require_rows("x", x, dtype=np.float32)
    require_vector("w", w, x.shape[1])
    require_vector("bias", bias, x.shape[1])
    require_rows("out", out, rows=len(x), width=x.shape[1], dtype=np.float32)
    with np.errstate(all="ignore"):
        width = np.float32(x.shape[1])
        centred = x - (lanes.lane_sum(x) / width)[:, None]
        variance = lanes.lane_sum(centred, squares=True) / width
        scaled = centred * (np.float32(1) / np.sqrt(variance + np.float32(eps)))[:, None]
        scaled = scaled if w is None else w * scaled
        out[:] = scaled if bias is None else scaled + bias


def rope(x: F32, cos: F32, sin: F32, heads: int, hd: int, threads: int = 1, rotary: int = 0,
         interleaved: bool = False) -> None:  # fmt: skip
    """Rotate x [m, heads * hd] in place by cos, sin [m, rotary / 2].

    The first `rotary` dimensions of each head are rotated (0: all), in pairs (i, i + rotary / 2), or (2i, 2i + 1) if
    they are interleaved.
    """
    require_rows("x", x, width=heads * hd, dtype=np.float32)
    half = rotary_of(rotary, hd) // 2
    require("cos", cos, (len(x), half), np.float32)
    require("sin", sin, (len(x), half), np.float32)
    for head in range(heads):
        rotated = x[:, head * hd : head * hd + 2 * half]
        first, second = (
            (rotated[:, part::2] if interleaved else rotated[:, part * half : (part + 1) * half])
            for part in (0, 1)
        )
        a, b = first.copy(), second.copy()
        with np.errstate(all="ignore"):
            first[:] = a * cos - b * sin
            second[:] = b * cos + a * sin


def activate(kind: Activation, gate: F32, up: F32 | None, out: F32, threads: int = 1, limit: float = 0.0,
             alpha: float = 1.702) -> None:  # fmt: skip
    """out = f(gate) * up, or f(gate) without up; all f32 [m, d]; `limit` and `alpha` are as in `Activation`."""
    kind = require_activation(kind, up is not None, limit)
    require_rows("gate", gate, dtype=np.float32)
    if up is not None:
        require_rows("up", up, rows=len(gate), width=gate.shape[1], dtype=np.float32)
    require_rows("out", out, rows=len(gate), width=gate.shape[1], dtype=np.float32)
    with np.errstate(all="ignore"):
        f = _activated(kind, gate, np.float32(limit), np.float32(alpha))
        if up is None:
            out[:] = f
        elif kind == Activation.SWIGLU_CLAMPED:
            out[:] = f * (np.clip(up, np.float32(-limit), np.float32(limit)) + np.float32(1))
        else:
            out[:] = f * up


def _activated(kind: Activation, x: F32, limit: np.float32, alpha: np.float32) -> F32:
    result: F32
    match kind:
        case Activation.SILU:
            result = _sigmoid_times(x, x)
        case Activation.GELU:
            result = x * lanes.normal(x)
        case Activation.GELU_TANH:  # (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
            cube = x * x * x * np.float32(0.044715)
            result = _sigmoid_times((x + cube) * np.float32(1.5957691216057308), x)
        case Activation.RELU2:
            result = np.square(np.maximum(x, np.float32(0)))
        case Activation.RELU:
            result = np.maximum(x, np.float32(0))
        case Activation.SIGMOID:
            result = _sigmoid_times(x, np.float32(1))
        case Activation.SWIGLU_CLAMPED:
            x = np.minimum(x, limit)
            result = _sigmoid_times(alpha * x, x)
        case Activation.IDENTITY:
            result = x
        case Activation.SILU_SCALED:
            result = _sigmoid_times(alpha * x, alpha * x)
    return result


def _sigmoid_times(x: F32, factor: F32 | np.float32) -> F32:
    product: F32 = factor / (np.float32(1) + lanes.exp(-x))
    return product


def softcap(x: F32, cap: float, threads: int = 1) -> None:
    """x = cap * tanh(x / cap) in place, x f32 [m, d]."""
    require_rows("x", x, dtype=np.float32)
    require_cap(cap)
    with np.errstate(all="ignore"):
        x[:] = np.float32(cap) * lanes.tanh(x / np.float32(cap))


def softmax(x: F32, threads: int = 1) -> None:
    """Softmax of each row of x [m, d], in place."""
    require_rows("x", x, dtype=np.float32)
    with np.errstate(all="ignore"):
        e = lanes.exp(x - lanes.lane_max(x)[:, None])
        x[:] = e / lanes.lane_sum(e)[:, None]


def top_k(x: F32, k: int, values: F32, ids: I32, threads: int = 1) -> None:
    """values, ids [m, k]: the k largest of each row of x [m, n], descending; of equals the lower id comes first.

    If k > n, the rest are -inf and -1.
    """
    require_rows("x", x, dtype=np.float32)
    require("values", values, (len(x), k), np.float32)
    require("ids", ids, (len(x), k), np.int32)
    clean = np.where(np.isnan(x), np.float32(-np.inf), x)
    order = np.argsort(-clean, axis=1, kind="stable")[:, :k]
    values[:] = -np.inf
    ids[:] = -1
    ids[:, : order.shape[1]] = order
    values[:, : order.shape[1]] = np.take_along_axis(clean, order, 1)


def lse_parts(x: F32, inv_t: F32, bounds: I32, out: F32, threads: int = 1) -> None:
    """out [m, P, 3] = max, sum exp(x - max), sum exp((x - max) * inv_t) of x[:, bounds[p]:bounds[p + 1]]."""
    require_rows("x", x, dtype=np.float32)
    edges = np.asarray(bounds)
    if (
        edges.ndim != 1
        or len(edges) < 2
        or edges[0] < 0
        or edges[-1] > x.shape[1]
        or (np.diff(edges) < 0).any()
    ):
        raise ValueError(f"bounds must rise within 0..{x.shape[1]}: {edges.tolist()}")
    require("inv_t", inv_t, (len(x),), np.float32)
    require("out", out, (len(x), len(edges) - 1, 3), np.float32)
    with np.errstate(all="ignore"):
        for p, (begin, end) in enumerate(itertools.pairwise(edges)):
            part = x[:, begin:end]
            top = lanes.lane_max(part)
            shifted = part - np.where(np.isneginf(top), np.float32(0), top)[:, None]
            out[:, p, 0] = top
            out[:, p, 1] = lanes.lane_sum(lanes.exp(shifted))
            out[:, p, 2] = lanes.lane_sum(lanes.exp(shifted * inv_t[:, None]))
