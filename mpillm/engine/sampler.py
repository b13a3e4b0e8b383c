"""Drawing the next token from the likeliest candidates, as a pure function of them and one random number.

The candidates of a row are the first k ids by logit, ties by lower id. Every filter keeps a prefix of that order
and drawing walks along it, so a short list decides exactly what the whole row would, unless the walk reaches its
end: then `draw` says so (None) and the caller asks for a longer one. Filters apply as in vLLM: temperature, min_p,
top_k, top_p.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from mpillm.engine import exact
from mpillm.engine.request import Request, TopLogprobs

COLDEST = 1e-5  # a temperature below it is taken for it
FIRST_LOOK = 128  # candidates asked for when tokens are drawn: enough for nearly every draw
FORBIDDEN = np.float32(-1e30)  # the logit of what may not be drawn: finite at any temperature


class Candidates(msgspec.Struct, frozen=True):
    """The likeliest tokens of one row.

    `values` are the logits that decide (after penalties, biases and masks), descending; `raw` the model's own.
    `weights` are exp((value - greatest value) / temperature), for rows that a token is drawn from. `log_z` is the
    logarithm of the sum of exp(raw logit) over the whole vocabulary, `scaled_z` the sum of such weights over it;
    both are NaN where no probability is wanted. `complete` if no token is missing. `finite` if all logits of the row
    are: else nothing here means anything.
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
        """Log-probability of the candidate at `index`."""
        return float(self.raw[index]) - self.log_z

    def top(self, count: int) -> TopLogprobs:
        """The first `count` candidates with their log-probabilities."""
        pairs = zip(self.ids[:count].tolist(), self.raw[:count].tolist(), strict=True)
        return [(token, logit - self.log_z) for token, logit in pairs]


def candidates_wanted(request: Request) -> int:
    """How many candidates to ask for at first."""
    alternatives = max(request.logprobs or 0, 1)
    if request.temperature == 0.0:
        return alternatives
    return max(alternatives, request.top_k if request.top_k > 0 else FIRST_LOOK)


def used_temperature(temperature: float) -> float:
    """The temperature as all ranks use it, a float32 that is 0 only where nothing is drawn."""
    return float(np.float32(max(temperature, COLDEST))) if temperature > 0 else 0.0


def inverse_temperature(temperature: float) -> float:
    """1 / temperature as all ranks use it: a finite float32; 1 where nothing is drawn."""
    return float(np.float32(1.0) / np.float32(used_temperature(temperature))) if temperature > 0 else 1.0


def weights_of(values: NDArray[np.float32], inv_t: NDArray[np.float64]) -> NDArray[np.float32]:
    """`Candidates.weights` of rows [n, k] of descending values, with 1 / temperature [n]."""
    scaled = values.astype(np.float64)
    scaled -= scaled[:, :1].copy()
    return exact.exp(scaled * inv_t[:, None]).astype(np.float32)


def draw(candidates: Candidates, request: Request, u: float) -> int | None:
    """The index of the token drawn with the random number `u` in [0, 1); None if the list is too short to tell."""
    if request.temperature == 0.0:
        return 0
    weights = candidates.weights
    kept = len(weights)
    # Whether the last kept one is known to be the last that any filter lets through.
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
        return None  # the mass of what min_p lets through is not known yet
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
        # Only rounding can take a closed walk past its end.
        return None if not (closed or request.top_p < 1.0) else kept - 1
    return index
