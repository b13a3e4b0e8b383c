"""The kernels of token mixers with a state for each sequence; see `reference` for how results compare.

Rows first_rows[s] : first_rows[s + 1] of a step belong to sequence s, whose state is row slots[s] of the states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from mpillm.kernels import lanes
from mpillm.kernels.checks import require, require_rows, require_sequences, require_vector
from mpillm.kernels.types import F32, I32, TILE_ROWS, delta_floats

CHAINS = 4  # partial sums over key dimensions: dimension j is added to sum j % CHAINS
_SERIES = tuple(np.float32(1 / n) for n in (13, 11, 9, 7, 5, 3))


def softplus(x: F32) -> F32:
    """Return ln(1 + e^x) = max(x, 0) + 2 artanh(u / (2 + u)) with u = e^-|x|, by the series of artanh."""
    with np.errstate(all="ignore"):
        u = lanes.exp(-np.abs(x))
        s = u / (u + np.float32(2))
        square = s * s
        p = np.full_like(x, 1 / 15)
        for c in _SERIES:
            p = lanes.fma(p, square, c)
        artanh = lanes.fma(p * square, s, s)
        result: F32 = np.where(x > 0, x, np.float32(0)) + (artanh + artanh)
    return result


def decays(x: F32, rates: F32, bias: F32, threads: int = 1, steps: F32 | None = None, scale: float = 1.0,
           low: float = 0.0, high: float = np.inf) -> None:  # fmt: skip
    """steps [m, d] = softplus(scale * x + bias), limited to low .. high; x [m, d] = e^(rates * steps), in place."""
    require("x", x, x.shape, np.float32)
    require_vector("rates", rates, x.shape[1])
    require_vector("bias", bias, x.shape[1])
    if steps is not None:
        require("steps", steps, x.shape, np.float32)
    with np.errstate(all="ignore"):
        made = np.clip(softplus(np.float32(scale) * x + bias), np.float32(low), np.float32(high))
        if steps is not None:
            steps[:] = made
        x[:] = lanes.exp(rates * made)


def short_conv(x: F32, w: F32, bias: F32 | None, tails: F32, first_rows: I32, slots: I32, out: F32, silu: bool,
               threads: int = 1) -> None:  # fmt: skip
    """out [m, channels] = causal convolution of each channel of x with w [taps, channels], then SiLU if `silu`.

    The last tap belongs to the row itself. `tails` [slot, >= (taps - 1) * channels] has the rows that precede a
    sequence's first row of this step; it is replaced by those that precede its next step.
    """
    taps, channels = w.shape
    require_rows("x", x, width=channels, dtype=np.float32)
    require("w", w, (taps, channels), np.float32)
    require_vector("bias", bias, channels)
    require_rows("out", out, rows=len(x), width=channels, dtype=np.float32)
    _require_states("tails", tails, (taps - 1) * channels)
    require_sequences(first_rows, slots, len(x), len(tails))
    with np.errstate(all="ignore"):
        for rows, slot in _sequences(first_rows, slots, len(x)):
            tail = tails[slot, : (taps - 1) * channels].reshape(taps - 1, channels)
            inputs = np.concatenate([tail, x[rows]])
            count = rows.stop - rows.start
            total = w[0] * inputs[:count]
            for tap in range(1, taps):
                total = lanes.fma(w[tap], inputs[tap : tap + count], total)
            if bias is not None:
                total = total + bias
            out[rows] = total / (np.float32(1) + lanes.exp(-total)) if silu else total
            tails[slot, : (taps - 1) * channels] = inputs[count:].ravel()


def delta_rule(q: F32, k: F32, v: F32, decay: F32, beta: F32, states: F32, first_rows: I32, slots: I32,
               key_of_head: I32, dk: int, dv: int, out: F32, threads: int = 1) -> None:  # fmt: skip
    """For each row and head: S *= decay; S += k (beta * (v - k S)); out [m, heads * dv] = q S.

    q, k [m, keys * dk], of which a head uses number key_of_head[head]; v [m, heads * dv]; decay, beta [m, heads];
    `states` [slot, >= delta_floats(heads, dk, dv)] begin with the heads' states, each in pieces of 16 columns.
    (Yang, Kautz and Hatamizadeh, Gated Delta Networks, 2024, equation 10.)
    """
    m, keys, heads = len(q), q.shape[1] // dk, len(key_of_head)
    require("q", q, (m, keys * dk), np.float32)
    require("k", k, (m, keys * dk), np.float32)
    require("v", v, (m, heads * dv), np.float32)
    if heads and not 0 <= key_of_head.min() <= key_of_head.max() < keys:
        raise ValueError(f"key_of_head must be within 0..{keys - 1}")
    require("decay", decay, (m, heads), np.float32)
    require("beta", beta, (m, heads), np.float32)
    require("out", out, (m, heads * dv), np.float32)
    _require_states("states", states, delta_floats(heads, dk, dv))
    require_sequences(first_rows, slots, m, len(states))
    queries, keys_of = (x.reshape(m, keys, dk)[:, key_of_head] for x in (q, k))
    values = v.reshape(m, heads, dv)
    with np.errstate(all="ignore"):
        for rows, slot in _sequences(first_rows, slots, m):
            with _state(states[slot], heads, dk, dv) as state:
                for row in range(rows.start, rows.stop):
                    state *= decay[row, :, None, None]
                    seen = _product(keys_of[row], state)
                    delta = (values[row] - seen) * beta[row, :, None]
                    state += keys_of[row, :, :, None] * delta[:, None, :]
                    out[row] = _product(queries[row], state).ravel()


def selective_scan(c: F32, b: F32, x: F32, decay: F32, step: F32, skip: F32, states: F32, first_rows: I32, slots: I32,
                   group_of_head: I32, dk: int, dv: int, out: F32, threads: int = 1) -> None:  # fmt: skip
    """For each row and head: S = decay S + b (step * x); out [m, heads * dv] = c S + skip * x.

    c, b [m, groups * dk], of which a head uses number group_of_head[head]; x [m, heads * dv]; decay, step [m, heads];
    skip [heads]; `states` as in `delta_rule`. (Dao and Gu, Transformers are SSMs, 2024, section 2 and appendix B.)
    """
    m, groups, heads = len(c), c.shape[1] // dk, len(group_of_head)
    require("c", c, (m, groups * dk), np.float32)
    require("b", b, (m, groups * dk), np.float32)
    require("x", x, (m, heads * dv), np.float32)
    if heads and not 0 <= group_of_head.min() <= group_of_head.max() < groups:
        raise ValueError(f"group_of_head must be within 0..{groups - 1}")
    require("decay", decay, (m, heads), np.float32)
    require("step", step, (m, heads), np.float32)
    require_vector("skip", skip, heads)
    require("out", out, (m, heads * dv), np.float32)
    _require_states("states", states, delta_floats(heads, dk, dv))
    require_sequences(first_rows, slots, m, len(states))
    reading, writing = (part.reshape(m, groups, dk)[:, group_of_head] for part in (c, b))
    values = x.reshape(m, heads, dv)
    with np.errstate(all="ignore"):
        for rows, slot in _sequences(first_rows, slots, m):
            with _state(states[slot], heads, dk, dv) as state:
                for row in range(rows.start, rows.stop):
                    delta = values[row] * step[row, :, None]
                    state *= decay[row, :, None, None]
                    state += writing[row, :, :, None] * delta[:, None, :]
                    read = _product(reading[row], state)
                    out[row] = (read + skip[:, None] * values[row]).ravel()


@contextmanager
def _state(stored: F32, heads: int, dk: int, dv: int) -> Iterator[F32]:
    """Yield the states of a slot's heads as [heads, dk, dv], and store them when the block ends."""
    pieces = -(-dv // TILE_ROWS)
    lying = stored[: delta_floats(heads, dk, dv)].reshape(heads, pieces, dk, TILE_ROWS)
    state = lying.transpose(0, 2, 1, 3).reshape(heads, dk, pieces * TILE_ROWS)[..., :dv].copy()
    yield state
    padded = np.zeros((heads, dk, pieces * TILE_ROWS), np.float32)
    padded[..., :dv] = state
    lying[:] = padded.reshape(heads, dk, pieces, TILE_ROWS).transpose(0, 2, 1, 3)


def _product(x: F32, state: F32) -> F32:
    """Return x [heads, dk] times state [heads, dk, dv], [heads, dv], summed over dk in `CHAINS` partial sums."""
    terms = x[:, :, None] * state
    sums = [np.add.reduce(terms[:, chain::CHAINS], axis=1) for chain in range(CHAINS)]
    total: F32 = (sums[0] + sums[1]) + (sums[2] + sums[3])
    return total


def _sequences(first_rows: I32, slots: I32, m: int) -> Iterator[tuple[slice, int]]:
    """Yield the rows and the slot of each sequence."""
    for first, end, slot in zip(first_rows, [*first_rows[1:], m], slots, strict=True):
        yield slice(int(first), int(end)), int(slot)


def _require_states(name: str, states: npt.NDArray[np.float32], width: int) -> None:
    require_rows(name, states, dtype=np.float32)
    if states.shape[1] < width:
        raise ValueError(f"{name} must be at least {width} wide, not {states.shape[1]}")
