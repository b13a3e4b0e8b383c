"""FP8: e4m3 numbers with a scale for a tensor, for each row, or for blocks of rows and columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import ml_dtypes
import numpy as np

from mpillm.errors import ModelError
from mpillm.kernels.types import BlockType
from mpillm.weights.formats.extent import Lies, Recipe, Rows
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.quantised.scales import FLOATS, floats_of, indices, scaled, stored_as, to_f16
from mpillm.weights.formats.recipes import Raw
from mpillm.weights.formats.stored import Bytes, Floats, Stored

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
SCALES = (*FLOATS, "F8_E8M0")


@dataclass(frozen=True)
class Float8:
    """Numbers [rows, columns], or of all experts, times the scale of their block of `block` rows and columns."""

    values: Raw
    scales: Raw
    block: tuple[int, int]

    @property
    def stored(self) -> Stored:
        """Blocks of FP8, or F16 where one of these would need several scales."""
        width, own = self.block[1], BlockType.FP8
        return stored_as("FP8", own if width % own.block == 0 or width >= self.shape[-1] else BlockType.F16)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def of_expert(self, expert: int) -> Float8:
        own = self.scales[expert] if self.scales.shape[:1] == self.values.shape[:1] else self.scales
        return replace(self, values=self.values[expert], scales=own)

    def blocks(self, rows: Rows) -> Bytes:
        height, width = self.block
        by_block, type = self._by_block[indices(rows) // height], self.stored.type
        if type is BlockType.FP8:
            if by_block.shape[1] > 1:
                by_block = np.repeat(by_block, width // type.block, axis=1)[
                    :, : -(-self.shape[-1] // type.block)
                ]
            return scaled(type, by_block, q=self.values.rows(rows))
        scales = np.repeat(by_block, width, axis=1)[:, : self.shape[-1]] if width > 1 else by_block
        return to_f16(E4M3[self.values.rows(rows)] * scales)

    @cached_property
    def _by_block(self) -> Floats:
        height, width = (-(-size // block) for size, block in zip(self.shape, self.block, strict=True))
        return floats_of(self.scales).reshape(height, width)

    def lies(self) -> Iterator[Lies]:
        yield from self.values.lies()
        yield from self.scales.lies()

    def release(self, rows: Rows) -> None:
        self.values.release(rows)


def float8(method: Method, values: Raw, scales: Raw, given: Sequence[tuple[int, int]]) -> Float8:
    """Return the recipe of e4m3 numbers, whose scales' shape says what has one; ModelError if it says nothing sensible.

    `given` are the blocks that the configuration names. Bytes are exponents (MXFP8).
    """
    outer, (n, k) = values.shape[:-2], values.shape[-2:]
    groups = scales.shape[-1] if scales.shape else 0
    if scales.dtype == "U8":
        scales = replace(scales, dtype="F8_E8M0")
    if scales.dtype in SCALES:
        for shape, covered in (
            *(((*outer, -(-n // block[0]), -(-k // block[1])), block) for block in given),
            ((*outer, n, 1), (1, k)),
            ((*outer, n), (1, k)),
            ((*outer, 1), (n, k)),
            ((*outer, 1, 1), (n, k)),
            (outer, (n, k)),
            *((whole, (n, k)) for whole in ((1,), ())),
            *([((*outer, n, groups), (1, k // groups))] if groups and k % groups == 0 else []),
        ):
            if scales.shape == shape:
                return Float8(values, scales, covered)
    raise ModelError(
        f"{method.path}: {scales.name} is {scales.dtype} {list(scales.shape)}, which are not scales of "
        f"{values.name} {list(values.shape)}."
    )


class Float8Method(Method):
    """`fp8`, `mxfp8` and `fbgemm_fp8`: X in e4m3, and X_scale_inv or X_scale, which multiplies it."""

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        fmt = self.config.get("fmt", "e4m3")
        if fmt not in ("e4m3", "float8_e4m3fn"):
            raise ModelError(f"{self.path}: fp8 numbers in {str(fmt)[:40]} are not supported; e4m3 are.")
        yield from take_float8(self, tensors, block_of(self, self.config.get("weight_block_size")))


def block_of(method: Method, given: object) -> tuple[int, int]:
    """Return the rows and columns of a block, 128 of both if the configuration says nothing."""
    if given is None:
        return 128, 128
    if not isinstance(given, list) or len(given) != 2 or not all(type(x) is int and x > 0 for x in given):
        raise ModelError(
            f"{method.path}: {str(given)[:60]} is not a size of the blocks of quantised weights."
        )
    return given[0], given[1]


def take_float8(
    method: Method, tensors: dict[str, Raw], *blocks: tuple[int, int]
) -> Iterator[tuple[str, Recipe]]:
    """Yield all matrices in e4m3, with their scales; the activations' scales are for those who round these too."""
    for name in [name for name, raw in tensors.items() if raw.dtype == "F8_E4M3" and len(raw.shape) > 1]:
        scale = next(
            (name + end for end in ("_scale_inv", "_scale") if name + end in tensors), f"{name}_scale"
        )
        if name in tensors:
            yield name, float8(method, tensors.pop(name), method.part(tensors, scale), blocks)
    method.drop(
        tensors,
        ".input_scale",
        ".input_scale_ub",
        ".activation_scale",
        ".k_scale",
        ".v_scale",
        ".output_scale",
    )
