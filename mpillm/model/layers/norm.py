"""RMS norm and LayerNorm: their tensors, and the norm that the kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpillm import kernels
from mpillm.weights.inventory import TensorSpec
from mpillm.weights.page import Page
from mpillm.weights.roles import Key


@dataclass(frozen=True)
class NormSpec:
    """A norm: RMS norm, or LayerNorm if `centred`; `offset` is added to the weights (Gemma's are stored minus one).

    Without `weights` they are all 1.
    """

    eps: float
    centred: bool = False
    bias: bool = False
    offset: float = 0.0
    weights: bool = True

    def tensors(self, role: str, layer: int, width: int) -> Iterator[TensorSpec]:
        """Yield the weights of the norm, and its bias if it has one, whose role is `role` + "_bias"."""
        if self.weights:
            yield TensorSpec(Key(role, layer), (width,))
        if self.bias:
            yield TensorSpec(Key(f"{role}_bias", layer), (width,))

    def kernel(self, page: Page, role: str, copy: bool = False, width: int = 0) -> kernels.Norm:
        """Return the norm of a loaded page, whose memory it refers to unless that is to be copied.

        `width` is that of a norm without weights.
        """
        if not self.weights:
            return kernels.Norm(width, self.eps, centred=self.centred)
        weight = page.vector(role).copy() if copy else page.vector(role)
        if self.offset:
            weight = weight + np.float32(self.offset)
        bias = page.vector(f"{role}_bias") if self.bias else None
        if bias is not None and copy:
            bias = bias.copy()
        return kernels.Norm(len(weight), self.eps, weight, bias, self.centred)


@dataclass(frozen=True)
class Norms:
    """The norms around a part of a layer: of its input, of its output before that is added, and of the sum."""

    before: NormSpec | None = None
    after: NormSpec | None = None
    of_sum: NormSpec | None = None
