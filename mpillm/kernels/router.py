"""Choose the experts of each row and their weights, in NumPy over single kernels: the same bits on every path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpillm import kernels
from mpillm.kernels.types import F32, I32, Activation


@dataclass(frozen=True)
class Router:
    """The rule that chooses `chosen` experts, as in DeepSeek V2 and V3 (arXiv 2405.04434, 2412.19437) and before.

    Scores are the softmax or the sigmoid of the router's logits. With `groups` > 1, experts are divided into groups of
    equal size, and experts are chosen from the `groups_chosen` best groups; the score of a group is the sum of its
    `group_best` best scores. Weights are the scores of the chosen experts, divided by their sum if `normalise`, times
    `scale`. Sparsemixer (arXiv 2409.12136, PhiMoE) ignores these settings and chooses one expert after the other: the
    weight of an expert is its softmax over the experts that are not yet chosen and whose logits are below its own by
    at most 2 `jitter` times the larger magnitude.
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
    """Return the weights and the numbers [m, chosen] of each row's experts; overwrites `logits` [m, experts].

    The best expert comes first; of equal experts or groups, the one with the lower number comes first. `correction`
    [experts] is added to the scores when experts and groups are chosen, and does not change the weights.
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
    ):  # a row that is not finite is reported when its logits are read
        if router.normalise:
            weights /= (_sum(weights) + np.float32(1e-20))[:, None]  # the sigmoids of all may be 0
        if router.scale != 1.0:
            weights *= np.float32(router.scale)
    return weights, ids


def _sparsemixer(logits: F32, router: Router, threads: int) -> tuple[F32, I32]:
    left, weights, ids = logits.copy(), [], []
    for _ in range(router.chosen):
        best, best_id = _top_k(left, 1, threads)
        with np.errstate(invalid="ignore"):  # 0 / 0, if all logits are 0, counts as near
            distance = (best - left) / np.maximum(np.abs(logits), best)
        near = np.where(distance > np.float32(2 * router.jitter), np.float32(-np.inf), left)
        kernels.softmax(near, threads)
        weights.append(np.take_along_axis(near, best_id, axis=1))
        ids.append(best_id)
        np.put_along_axis(left, best_id, np.float32(-np.inf), axis=1)
    return np.concatenate(weights, axis=1), np.concatenate(ids, axis=1)


def _of_best_groups(ranks: F32, router: Router, threads: int) -> F32:
    """Return the ranks with -inf for the experts outside the best groups."""
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
    """Sum each row from the first column to the last; NumPy's own sum may have another order."""
    total: F32 = x[:, 0].copy()
    for column in range(1, x.shape[1]):
        total += x[:, column]
    return total
