"""The rows of a step and the experts of a layer: which rows go to which experts, and the experts' pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.model.layers.rank import Floats
from mpillm.weights.inventory import EXPERT, PageSpec, TensorSpec

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Prepared:
    """Normed rows h [m, hidden], what goes where, and what the shared MLP's output is multiplied by, f32 [m, 1].

    `mixed`: rows [m, hidden or latent] with the experts that they go to, whose sum is the mixture. `after`: the norms
    of what the shared MLP and the mixture make.
    """

    h: Floats
    mixed: list[tuple[Floats, Routed]]
    gate: Floats | None
    after: tuple[kernels.Norm, kernels.Norm] | None = None


@dataclass(frozen=True)
class Routed:
    """The choices of a step's rows by expert: those of experts[i] are rows[starts[i] : starts[i + 1]], with weights."""

    experts: NDArray[np.integer[Any]]
    starts: Ints
    rows: Ints
    weights: Floats

    @staticmethod
    def of(weights: Floats, ids: Ints) -> Routed:
        """From each row's weights and experts, [m, chosen]."""
        order = ids.argsort(axis=None, kind="stable")  # all choices, by their expert and then by their row
        experts, starts = np.unique(ids.ravel()[order], return_index=True)
        bounds = np.append(starts, len(order)).astype(np.int32)
        rows = (order // ids.shape[1]).astype(np.int32)
        return Routed(experts, bounds, rows, weights.ravel()[order])


class ExpertPages(Sequence[PageSpec]):
    """The pages of a layer's experts, made when they are asked for: a model may have ten thousand of them."""

    def __init__(self, layer: int, count: int, tensors: tuple[TensorSpec, ...]) -> None:
        self._layer, self._count, self._tensors = layer, count, tensors

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, expert: Any) -> Any:
        if not 0 <= expert < self._count:
            raise IndexError(expert)
        tensors = tuple(
            TensorSpec(tensor.key._replace(expert=expert), tensor.shape, tensor.rows, tensor.cols)
            for tensor in self._tensors
        )
        return PageSpec(EXPERT, tensors, self._layer, expert)
