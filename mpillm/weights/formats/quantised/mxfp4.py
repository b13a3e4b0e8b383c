"""MXFP4 as gpt-oss is published: blocks of 32 e2m1 numbers and their exponents in two tensors of all experts."""

from __future__ import annotations

from collections.abc import Iterator

from mpillm.weights.formats.extent import Recipe
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.recipes import Mxfp4, Raw

_VALUES, _EXPONENTS = "_blocks", "_scales"


class Mxfp4Method(Method):
    """X_blocks u8 [experts, rows, columns / 32, 16] and X_scales u8 [experts, rows, columns / 32] make X."""

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        for name in [name for name in tensors if name.endswith(_VALUES)]:
            base = name.removesuffix(_VALUES)
            values, exponents = tensors.pop(name), self.part(tensors, base + _EXPONENTS)
            self.check(values, ("U8",), (*values.shape[:-1], 16))
            self.check(exponents, ("U8",), values.shape[:-1])
            yield base, Mxfp4(values, exponents)
