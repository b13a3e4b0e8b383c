"""Choose the experts of each row, and their weights. NumPy over kernels gives the same bits on every path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpillm import kernels
from mpillm.kernels.types import F32, I32, Activation


@dataclass(frozen=True)
class Router:
    """How `chosen` experts are found, as in DeepSeek V2 and V3 (arXiv 2405.04434, 2412.19437) and earlier models.

    Scores are the softmax or the sigmoid of the router's logits. With `groups` > 1, experts are divided into groups of
    equal size, and only those of the `groups_chosen` best groups count; the score of a group is the sum of its
    `group_best` best. Weights are the scores of the chosen experts, divided by their sum if `normalise`, times `scale`.
    With sparsemixer (arXiv 2409.12136, PhiMoE) the weight of each expert in turn is its softmax among those that were
    not chosen before it and whose logits are not further from its own than `jitter` allows; nothing else counts then.
    """

    chosen: int
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    groups: int = 1
    groups_chosen: int = 1
    group_best: int = 2
    normalise: bool = True
    scale: float = 1.0
    jitter: float = 0.0


def route(logits: F32, router: Router, correction: F32 | None = None, threads: int = 1) -> tuple[F32, I32]:
    """Return the weights and numbers [m, chosen] of the experts of rows; their logits [m, experts] are overwritten.

    The best expert comes first; among equals (experts or groups) the lower number does. `correction` [experts] is
    added to the scores only for choosing experts and groups.
    """
    if router.scoring == "sparsemixer":
        return _sparsemixer(logits, router, threads)
    scores = logits
    if router.scoring == "softmax":
        kernels.softmax(scores, threads)
    else:
        kernels.activate(Activation.SIGMOID, scores, None, scores, threads)
    ranks = scores if correction is None else scores + correction
    if router.groups > 1:
        ranks = _of_best_groups(ranks, router, threads)
    weights, ids = _top_k(ranks, router.chosen, threads)
    if ranks is not scores:
        weights = np.take_along_axis(scores, ids, axis=1)
    with np.errstate(
        invalid="ignore", over="ignore"
    ):  # a row that is not finite stays so, and is found at the end
        if router.normalise:
            weights /= (_sum(weights) + np.float32(1e-20))[:, None]  # the sigmoids of all may be 0
        if router.scale != 1.0:
            weights *= np.float32(router.scale)
    return weights, ids


def _sparsemixer(logits: F32, router: Router, threads: int) -> tuple[F32, I32]:
    left, weights, ids = logits.copy(), [], []
    for _ in range(router.chosen):
        best, best_id = _top_k(left, 1, threads)
        with np.errstate(invalid="ignore"):  # 0 / 0, of logits that are all 0, is not far
            distance = (best - left) / np.maximum(np.abs(logits), best)
        near = np.where(distance > np.float32(2 * router.jitter), np.float32(-np.inf), left)
        kernels.softmax(near, threads)
        weights.append(np.take_along_axis(near, best_id, axis=1))
        ids.append(best_id)
        np.put_along_axis(left, best_id, np.float32(-np.inf), axis=1)
    return np.concatenate(weights, axis=1), np.concatenate(ids, axis=1)


def _of_best_groups(ranks: F32, router: Router, threads: int) -> F32:
    """The ranks with -inf for experts of other groups than the best ones."""
    m, experts = ranks.shape
    grouped = ranks.reshape(m * router.groups, experts // router.groups)
    best = _sum(_top_k(grouped, router.group_best, threads)[0]).reshape(m, router.groups)
    _, chosen = _top_k(best, router.groups_chosen, threads)
    kept = np.full((m, router.groups, 1), -np.inf, np.float32)
    np.put_along_axis(kept[..., 0], chosen, np.float32(0), axis=1)
    return (grouped.reshape(m, router.groups, -1) + kept).reshape(m, experts)


def _top_k(x: F32, k: int, threads: int) -> tuple[F32, I32]:
    values, ids = np.empty((len(x), k), np.float32), np.empty((len(x), k), np.int32)
    kernels.top_k(x, k, values, ids, threads)
    return values, ids


def _sum(x: F32) -> F32:
    """Sums of rows, from the first column to the last: NumPy's own sum may pair them up."""
    total: F32 = x[:, 0].copy()
    for column in range(1, x.shape[1]):
        total += x[:, column]
    return total
