"""Draws the next token from the likeliest candidates: a pure function of these and one random number.

The candidates of a row are the first k ids by descending logit; equal logits are ordered by id. Every filter keeps a
prefix of that order, and drawing walks along it. So a short list gives the same token as the whole row, unless the walk
reaches its end: then `draw` returns None and the caller fetches a longer list. Filters apply in vLLM's order:
temperature, min_p, top_k, top_p.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from mpillm.engine import exact
from mpillm.engine.request import Request, TopLogprobs

COLDEST = 1e-5  # the lowest temperature; lower ones above 0 are raised to it
FIRST_LOOK = 128  # candidates requested when tokens are drawn: enough for nearly every draw
FORBIDDEN = np.float32(-1e30)  # the logit of tokens that may not be drawn; finite at any temperature


class Candidates(msgspec.Struct, frozen=True):
    """The likeliest tokens of one row.

    `values` are the logits after penalties, biases and masks, descending; `raw` are the model's logits. `weights` are
    exp((value - largest value) / temperature), for rows from which a token is drawn. `log_z` is the logarithm of the
    sum of exp(raw logit) over the whole vocabulary, and `scaled_z` the sum of all weights; both are NaN if no
    probability is needed. `complete` tells whether the list has the whole vocabulary, `finite` whether all logits of
    the row are finite; if not, the other fields are meaningless.
    """

    ids: NDArray[np.int32]
    values: NDArray[np.float32]
    raw: NDArray[np.float32]
    weights: NDArray[np.float32]
    log_z: float
    scaled_z: float
    complete: bool
    target_logit: float = math.nan
    finite: bool = True

    def logprob(self, index: int) -> float:
        """Return the log-probability of the candidate at `index`."""
        return float(self.raw[index]) - self.log_z

    def top(self, count: int) -> TopLogprobs:
        """Return the first `count` candidates with their log-probabilities."""
        pairs = zip(self.ids[:count].tolist(), self.raw[:count].tolist(), strict=True)
        return [(token, logit - self.log_z) for token, logit in pairs]


def candidates_wanted(request: Request) -> int:
    """Return how many candidates to request at first."""
    alternatives = max(request.logprobs or 0, 1)
    if request.temperature == 0.0:
        return alternatives
    return max(alternatives, request.top_k if request.top_k > 0 else FIRST_LOOK)


def used_temperature(temperature: float) -> float:
    """Return the temperature that all ranks use, a float32; it is 0 only for greedy decoding."""
    return float(np.float32(max(temperature, COLDEST))) if temperature > 0 else 0.0


def inverse_temperature(temperature: float) -> float:
    """Return 1 / temperature as all ranks use it, a finite float32; it is 1 for greedy decoding."""
    return float(np.float32(1.0) / np.float32(used_temperature(temperature))) if temperature > 0 else 1.0


def weights_of(values: NDArray[np.float32], inv_t: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return `Candidates.weights` of rows [n, k] of descending values, with 1 / temperature [n]."""
    scaled = values.astype(np.float64)
    scaled -= scaled[:, :1].copy()
    return exact.exp(scaled * inv_t[:, None]).astype(np.float32)


def draw(candidates: Candidates, request: Request, u: float) -> int | None:
    """Return the index of the token drawn with `u` in [0, 1), or None if the list is too short to decide."""
    if request.temperature == 0.0:
        return 0
    weights = candidates.weights
    kept = len(weights)
    # Whether the last kept candidate is known to be the last one that passes the filters.
    closed = candidates.complete
    if candidates.values[-1] <= FORBIDDEN / 2:
        kept, closed = max(int(np.count_nonzero(candidates.values > FORBIDDEN / 2)), 1), True
        weights = weights[:kept]
    if request.min_p > 0.0:
        below = np.flatnonzero(weights < request.min_p)
        if len(below):
            kept, closed = int(below[0]), True
    if 0 < request.top_k <= kept:
        kept, closed = request.top_k, True
    cumulative = np.cumsum(weights[:kept], dtype=np.float64)
    total = float(cumulative[-1])
    if not closed and request.min_p > 0.0:
        return None  # the total weight of the candidates that pass min_p is not known yet
    if not closed:
        total = candidates.scaled_z
    if request.top_p < 1.0:
        reached = int(np.searchsorted(cumulative, request.top_p * total)) + 1
        if reached > kept and not closed:
            return None
        kept = min(reached, kept)
        total = float(cumulative[kept - 1])
    index = int(np.searchsorted(cumulative[:kept], u * total, side="right"))
    if index >= kept:
        # Rounding can move the walk past the last candidate.
        return None if not (closed or request.top_p < 1.0) else kept - 1
    return index
