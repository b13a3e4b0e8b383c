"""compressed-tensors: what llm-compressor writes. A matrix's own tensors say how it is quantised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Lies, Recipe, Rows
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.quantised.float4 import nvfp4
from mpillm.weights.formats.quantised.float8 import block_of, take_float8
from mpillm.weights.formats.quantised.integers import (
    Int8,
    Mxfp6,
    by_row,
    integer_blocks,
    integer_type,
    rows_of,
)
from mpillm.weights.formats.quantised.scales import (
    FLOATS,
    Ints,
    array_of,
    floats_of,
    indices,
    stored_as,
    unpacked,
)
from mpillm.weights.formats.recipes import Mxfp4, Raw
from mpillm.weights.formats.stored import Bytes, Floats, Stored


@dataclass(frozen=True)
class PackedInts:
    """W[o, i] = scales[o, g] * (q[o, i] - zeros[o, g]) of integers in words along the rows, g the group of column i.

    All integers have half of their range added. `groups`: see `gptq.Grouped`.
    """

    bits: int
    q: Raw
    scales: Raw
    zeros: Raw | None
    groups: Ints | None
    shape: tuple[int, int]

    @cached_property
    def stored(self) -> Stored:
        """Say how a matrix is stored, like `gptq.Grouped.stored`."""
        columns = self.shape[1] // self._scales.shape[1] if self.groups is None else 0
        return stored_as(f"INT{self.bits}", integer_type(self.bits, self.zeros is not None, columns))

    def of_expert(self, expert: int) -> PackedInts:
        raise AssertionError("each expert has tensors of its own")

    def blocks(self, rows: Rows) -> Bytes:
        index, k = indices(rows), self.shape[1]
        q = unpacked(np.ascontiguousarray(self.q.rows(rows)).view(np.int32), self.bits)[:, :k]
        zeros = None if self._zeros is None else rows_of(self._zeros, index)
        return integer_blocks(
            self.stored.type, self.bits, q, rows_of(self._scales, index), zeros, self.groups
        )

    @cached_property
    def _scales(self) -> Floats:
        scales: Floats = by_row(floats_of(self.scales))
        return scales

    @cached_property
    def _zeros(self) -> Ints | None:
        """With half of the range added, [rows or 1, groups]; those of rows are packed down the rows."""
        if self.zeros is None:
            return None
        raw = array_of(self.zeros)
        if self.zeros.dtype == "I8":
            own: Ints = by_row(raw).astype(np.int16) + 2 ** (self.bits - 1)
            return own
        zeros: Ints = unpacked(np.ascontiguousarray(raw.T), self.bits).T[: self.shape[0]]
        return zeros

    def lies(self) -> Iterator[Lies]:
        for raw in (self.q, self.scales, *([self.zeros] if self.zeros else [])):
            yield from raw.lies()

    def release(self, rows: Rows) -> None:
        self.q.release(rows)


class CompressedMethod(Method):
    """`compressed-tensors`: integers of 2 to 8 bits in words, int8, FP8, NVFP4, MXFP4, MXFP6 and MXFP8."""

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        for key, off in (("sparsity_config", "dense"), ("transform_config", None)):
            value = self.config.get(key) or {}
            if value and not (off and value.get("format") == off):
                raise ModelError(f"{self.path}: {key} of compressed-tensors is not supported.")
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            base = name.removesuffix("_packed")
            yield base, self._packed(tensors, base)
        for name in [
            name for name, raw in tensors.items() if raw.dtype == "I8" and f"{name}_scale" in tensors
        ]:
            values, scales = tensors.pop(name), self.part(tensors, f"{name}_scale")
            rows, columns = (*values.shape, 0)[:2]
            self.check(values, ("I8",), (rows, columns))
            groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[1] else 1
            self.check(scales, FLOATS, (rows, groups), (rows,), (1,), ())
            self.groups_of(columns, groups, scales)
            zeros = tensors.pop(f"{name}_zero_point", None)
            if zeros is not None:
                self.check(zeros, ("I8",), scales.shape)
            asymmetric = zeros if zeros and array_of(zeros).any() else None
            yield name, Int8(values, scales, asymmetric, w8a8=self._int8_activations())
        given = [weights.get("block_structure") for weights in self._weights()]
        blocks = [block_of(self, block) for block in given if block is not None]
        yield from take_float8(self, tensors, *(blocks or [block_of(self, None)]))
        self.drop(
            tensors,
            ".weight_zero_point",
            ".input_zero_point",
            ".input_global_scale",
            ".output_zero_point",
            ".weight_shape",
        )

    def _weights(self) -> Iterator[dict[str, Any]]:
        """Return the configuration of the weights of each group of layers."""
        return self._of_groups("weights")

    def _int8_activations(self) -> bool:
        """Return whether activations of some layers are rounded to int8; scales that are kept for these are dropped."""
        return any(
            part.get("num_bits") == 8 and part.get("type", "int") == "int"
            for part in self._of_groups("input_activations")
        )

    def _of_groups(self, key: str) -> Iterator[dict[str, Any]]:
        groups = self.config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            part = group.get(key) if isinstance(group, dict) else None
            if isinstance(part, dict):
                yield part

    def _bits(self, q: Raw, words: int, k: int) -> int:
        """Return the bits of each of k numbers in `words` words; if several are possible, the configuration's."""
        fitting = [bits for bits in range(2, 9) if -(-k * bits // 32) == words]
        integers = [weights.get("num_bits") for weights in self._weights() if weights.get("type") != "float"]
        said = [bits for bits in fitting if bits in integers]
        if len(said or fitting) != 1:
            raise ModelError(
                f"{self.path}: {q.name} has {words} words for {k} columns; 2 to 8 bits are supported."
            )
        return (said or fitting)[0]

    def _microscaled(self, q: Raw, scales: Raw) -> Recipe:
        """MXFP4 or MXFP6, by the number of bytes for each exponent."""
        rows, count = (*scales.shape, 0)[:2]
        self.check(scales, ("U8",), (rows, count))
        self.check(q, ("U8",), (rows, 16 * count), (rows, 24 * count))
        if q.shape[1] == 24 * count:
            return Mxfp6(q, scales)
        return Mxfp4(replace(q, shape=(rows, count, 16)), scales)

    def _packed(self, tensors: dict[str, Raw], base: str) -> Recipe:
        q, scales = self.part(tensors, f"{base}_packed"), self.part(tensors, f"{base}_scale")
        whole, index = (tensors.pop(f"{base}_{end}", None) for end in ("global_scale", "g_idx"))
        zeros, shape = (tensors.pop(f"{base}_{end}", None) for end in ("zero_point", "shape"))
        words = q.shape[1] if len(q.shape) == 2 else 0
        if whole is not None:
            return nvfp4(self, q, scales, whole, divides=True)
        if q.dtype == "U8":
            return self._microscaled(q, scales)
        if shape is None:
            raise ModelError(f"{self.path} has no tensor {base}_shape; the model is not complete.")
        self.check(shape, ("I64", "I32"), (2,))
        n, k = (int(size) for size in array_of(shape))
        self.check(q, ("I32",), (n, words))
        bits = self._bits(q, words, k)
        count = scales.shape[1] if len(scales.shape) == 2 else 1
        self.check(scales, FLOATS, (n, count), (1,), ())
        if zeros is not None and zeros.dtype == "I8":
            self.check(zeros, ("I8",), (n, count), (1,), ())
        elif zeros is not None:
            self.check(zeros, ("I32",), (-(-n * bits // 32), count))
        if index is not None:
            self.check(index, ("I32", "I64"), (k,))
        return PackedInts(bits, q, scales, zeros, self.groups_of(k, count, scales, index), (n, k))
