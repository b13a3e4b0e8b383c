"""GPTQ and AWQ: integers of 2, 3, 4 or 8 bits with a scale and a zero for each group of columns, transposed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Lies, Recipe, Rows
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.quantised.integers import integer_blocks, integer_type
from mpillm.weights.formats.quantised.scales import (
    FLOATS,
    Ints,
    floats_of,
    indices,
    stored_as,
    unpacked,
)
from mpillm.weights.formats.recipes import Raw
from mpillm.weights.formats.stored import Bytes, Stored

AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word the numbers of neighbouring rows are


@dataclass(frozen=True)
class Grouped:
    """W[o, i] = scales[g, o] * (q[i, o] - zeros[g, o]), where g is the group of column i.

    `groups` [columns] is the group of each one, or None if they follow one another. `less_one`: zeros are stored less
    1. `by_rows`: words hold neighbouring rows of W (AWQ), not columns, in an order of their own unless `in_order`.
    `signed`: numbers and zeros are two's complements. Without `zeros` these are in the middle.
    """

    name: str
    bits: int
    q: Raw
    zeros: Raw | None
    scales: Raw
    less_one: bool
    symmetric: bool
    groups: Ints | None
    by_rows: bool
    in_order: bool = False
    signed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        words, rows = self.q.shape
        return (rows * 32 // self.bits, words) if self.by_rows else (rows, words * 32 // self.bits)

    @cached_property
    def stored(self) -> Stored:
        """Q4_0, Q8_0 and the like; see `integer_type`."""
        columns = self.shape[1] // self.scales.shape[0] if self.groups is None else 0
        return stored_as(self.name, integer_type(self.bits, not self.symmetric, columns))

    def of_expert(self, expert: int) -> Grouped:
        raise AssertionError("each expert has tensors of its own")

    def blocks(self, rows: Rows) -> Bytes:
        index = indices(rows)
        q = self._rows_of(self.q, index, not self.by_rows).T
        scales = floats_of(self.scales)[:, index].T
        own = None if self.zeros is None else self._rows_of(self.zeros, index, False).T
        middle = 2 ** (self.bits - 1)
        if self.symmetric:
            if self.zeros is not None and (own != middle).any():
                raise ModelError(
                    f"{self.q.file.path}: {self.zeros.name} has other zeros than {middle}, but the configuration says "
                    "that weights are symmetric."
                )
            own = None
        return integer_blocks(self.stored.type, self.bits, q, scales, own, self.groups)

    def _rows_of(self, raw: Raw, index: NDArray[np.integer[Any]], down: bool) -> NDArray[np.uint8]:
        """Return numbers of some rows of W: [columns or groups, len(index)]; `down`: words hold columns."""
        words = raw.bytes().view(np.int32)
        if down:
            taken = np.ascontiguousarray(words[:, index].T)
            return np.ascontiguousarray(unpacked(taken, self.bits).T)
        together = self.bits if 32 % self.bits else 1  # words that numbers cross
        each = 32 * together // self.bits
        first, last = int(index.min()) // each, int(index.max()) // each
        taken = np.ascontiguousarray(words[:, first * together : (last + 1) * together])
        numbers = unpacked(taken, self.bits)
        if raw is self.zeros and self.less_one:
            numbers = self._plus_one(taken, numbers)
        if self.by_rows and not self.in_order:
            numbers = numbers.reshape(len(words), -1, each)[..., AWQ_ORDER].reshape(len(words), -1)
        if self.signed:
            numbers = numbers ^ np.uint8(2 ** (self.bits - 1))
        return numbers[:, index - first * each]

    def _plus_one(self, words: Ints, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Zeros that were stored less 1: whole words were, and a zero of 0 has borrowed from the next number."""
        if 32 % self.bits:
            more: NDArray[np.uint8] = numbers + np.uint8(1) & np.uint8(2**self.bits - 1)
            return more
        ones = np.uint32(sum(1 << at for at in range(0, 32, self.bits)))
        return unpacked(words.view(np.uint32) + ones, self.bits)

    def lies(self) -> Iterator[Lies]:
        for raw in (self.q, self.scales, *([self.zeros] if self.zeros else [])):
            yield from raw.lies()

    def release(self, rows: Rows) -> None:
        self.q.release()


class GptqMethod(Method):
    """`gptq`: X.qweight, X.qzeros, X.scales and perhaps X.g_idx make X.weight."""

    name: ClassVar[str] = "GPTQ"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    by_rows: ClassVar[bool] = False  # see `Grouped`

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        bits = self.config.get("bits", self.config.get("w_bit"))
        if bits not in self.bits:
            raise ModelError(
                f"{self.path}: {self.config['quant_method']} with {bits!r:.20} bits is not supported; "
                f"supported: {', '.join(map(str, self.bits))}."
            )
        symmetric, less_one = self.symmetric(), self.less_one()
        for name in [name for name in tensors if name.endswith(".qweight")]:
            base = name.removesuffix(".qweight")
            q, zeros, scales = (
                self.part(tensors, f"{base}.{end}") for end in ("qweight", "qzeros", "scales")
            )
            index = tensors.pop(f"{base}.g_idx", None)
            own, columns = self.sizes(bits, q, zeros, scales)
            if index is not None:
                self.check(index, ("I32",), (columns,))
            elif self.config.get("desc_act") is True and scales.shape[0] > 1:
                raise ModelError(
                    f"{self.path} has no tensor {base}.g_idx, but its desc_act says that columns are not in the order "
                    "of their groups; the model is not complete."
                )
            groups = self.groups_of(columns, scales.shape[0], scales, index)
            recipe = Grouped(self.name, own, q, zeros, scales, less_one, symmetric, groups, self.by_rows)
            yield f"{base}.weight", recipe

    def symmetric(self) -> bool:
        """Return whether all zeros are in the middle; `dynamic` has rules of some layers (GPTQModel)."""
        rules = self.config.get("dynamic")
        own = rules.values() if isinstance(rules, Mapping) else ()
        return self.config.get("sym") is True and not any(
            isinstance(rule, Mapping) and rule.get("sym") is False for rule in own
        )

    def less_one(self) -> bool:
        """Return whether zeros are stored less 1; ModelError if numbers are packed in another order."""
        found = self.config.get("checkpoint_format") or self.config.get("format") or "gptq"
        if found not in ("gptq", "gptq_v2") or self.config.get("is_marlin_format"):
            raise ModelError(
                f"{self.path}: gptq in the format {str(found)[:40]!r} is not supported; supported: gptq, gptq_v2."
            )
        return found == "gptq"

    def sizes(self, bits: int, q: Raw, zeros: Raw, scales: Raw) -> tuple[int, int]:
        """Return the bits of numbers, and columns of the matrix; ModelError if shapes do not go together."""
        words, rows = self.sizes_of(q, "I32")
        count = scales.shape[0] if scales.shape else 0
        # Some layers may have other bits than the configuration says of most.
        of_zeros = zeros.shape[1] if len(zeros.shape) == 2 else 0
        bits = next((own for own in (bits, *self.bits) if -(-rows * own // 32) == of_zeros), bits)
        columns = words * 32 // bits
        self.check(scales, FLOATS, (count, rows))
        self.check(zeros, ("I32",), (count, -(-rows * bits // 32)))
        return bits, columns


class AwqMethod(GptqMethod):
    """`awq`: the same, of 4 bits, with words that hold neighbouring rows in an order of their own."""

    name = "AWQ"
    bits = (4,)
    by_rows = True

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        self.drop(tensors, ".g_idx")  # the columns are always in order
        yield from super().take(tensors)

    def symmetric(self) -> bool:
        version = self.config.get("version") or self.config.get("format") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise ModelError(f"{self.path}: awq version {str(version)[:40]!r} is not supported; gemm is.")
        return self.config.get("zero_point", True) is False

    def less_one(self) -> bool:
        return False

    def sizes(self, bits: int, q: Raw, zeros: Raw, scales: Raw) -> tuple[int, int]:
        columns, words = self.sizes_of(q, "I32")
        count = scales.shape[0] if scales.shape else 0
        self.check(scales, FLOATS, (count, words * 8))
        self.check(zeros, ("I32",), (count, words))
        return bits, columns
