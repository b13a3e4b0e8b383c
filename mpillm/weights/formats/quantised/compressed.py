"""compressed-tensors: what llm-compressor writes. A matrix's own tensors say how it is quantised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import ModelError
from mpillm.kernels.types import QUANT_BLOCK, BlockType
from mpillm.weights.formats.extent import Lies, Recipe, Rows
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.quantised.float4 import Int8, nvfp4
from mpillm.weights.formats.quantised.float8 import block_of, take_float8
from mpillm.weights.formats.quantised.scales import (
    FLOATS,
    array_of,
    floats_of,
    indices,
    stored_as,
    to_f16,
    to_q4,
    to_q8_0,
    unpacked,
)
from mpillm.weights.formats.recipes import Mxfp4, Raw
from mpillm.weights.formats.stored import Bytes, Stored


@dataclass(frozen=True)
class PackedInts:
    """W[o, i] = scales[o, g] * (q[o, i] - zeros[o, g]) of integers in words along the rows, g the group of column i.

    All integers have half of their range added. `groups`: see `gptq.Grouped`.
    """

    bits: int
    q: Raw
    scales: Raw
    zeros: Raw | None
    groups: NDArray[np.integer[Any]] | None
    shape: tuple[int, int]

    @cached_property
    def stored(self) -> Stored:
        """Say how a matrix is stored, like `gptq.Grouped.stored`."""
        k, count = self.shape[1], self._scales.shape[1]
        if self.groups is None and k // count % QUANT_BLOCK == 0:
            if self.bits == 4:
                return stored_as("INT4", BlockType.Q4_1 if self.zeros else BlockType.Q4_0)
            if not self.zeros:
                return stored_as("INT8", BlockType.Q8_0)
        return stored_as(f"INT{self.bits}", BlockType.F16)

    def of_expert(self, expert: int) -> PackedInts:
        raise AssertionError("each expert has tensors of its own")

    def blocks(self, rows: Rows) -> Bytes:
        index, k = indices(rows), self.shape[1]
        q = unpacked(np.ascontiguousarray(self.q.rows(rows)).view(np.int32), self.bits)[:, :k]
        scales = self._scales[index if len(self._scales) > 1 else index * 0]
        each, type = k // scales.shape[1], self.stored.type
        zeros = np.full(scales.shape, 2 ** (self.bits - 1), np.int16)
        if self.zeros:
            numbers = unpacked(np.ascontiguousarray(array_of(self.zeros).T), self.bits).T
            zeros = numbers[: self.shape[0]][index].astype(np.int16)
        if type is BlockType.F16:
            group = np.arange(k) // each if self.groups is None else self.groups
            return to_f16((q - zeros[:, group]).astype(np.float32) * scales[:, group])
        by_block = np.repeat(scales, each // QUANT_BLOCK, axis=1)
        if type is BlockType.Q8_0:
            return to_q8_0((q ^ 128).view(np.int8), by_block)
        own = np.repeat(zeros, each // QUANT_BLOCK, axis=1).astype(np.float32) if self.zeros else None
        return to_q4(q, by_block, own)

    @cached_property
    def _scales(self) -> NDArray[np.float32]:
        found = floats_of(self.scales)
        return found.reshape(-1, 1) if found.ndim < 2 else found

    def lies(self) -> Iterator[Lies]:
        for raw in (self.q, self.scales, *([self.zeros] if self.zeros else [])):
            yield from raw.lies()

    def release(self, rows: Rows) -> None:
        self.q.release(rows)


class CompressedMethod(Method):
    """`compressed-tensors`: int4 and int8 in words, int8, FP8, NVFP4 and MXFP4."""

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
            self.check(scales, FLOATS, (rows, 1), (rows,), (1,), ())
            if f"{name}_zero_point" in tensors and array_of(tensors.pop(f"{name}_zero_point")).any():
                raise ModelError(f"{self.path}: {name} is of int8 with zero points, which is not supported.")
            yield name, Int8(values, scales)
        yield from take_float8(self, tensors, block_of(self, self._block()))
        self.drop(
            tensors,
            ".weight_zero_point",
            ".input_zero_point",
            ".input_global_scale",
            ".output_zero_point",
            ".weight_shape",
        )

    def _block(self) -> object:
        """The size of FP8's blocks, which all groups of layers share."""
        groups = self.config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict) and weights.get("block_structure"):
                return weights["block_structure"]
        return None

    def _packed(self, tensors: dict[str, Raw], base: str) -> Recipe:
        q, scales = self.part(tensors, f"{base}_packed"), self.part(tensors, f"{base}_scale")
        whole, index = (tensors.pop(f"{base}_{end}", None) for end in ("global_scale", "g_idx"))
        zeros, shape = (tensors.pop(f"{base}_{end}", None) for end in ("zero_point", "shape"))
        rows, words = (*q.shape, 0)[:2]
        if whole is not None:
            return nvfp4(self, q, scales, whole, divides=True)
        if q.dtype == "U8":
            self.check(scales, ("U8",), (rows, words // 16))
            return Mxfp4(replace(q, shape=(rows, words // 16, 16)), scales)
        if shape is None:
            raise ModelError(f"{self.path} has no tensor {base}_shape; the model is not complete.")
        n, k = (int(size) for size in array_of(shape))
        bits = next((bits for bits in (4, 8) if -(-k * bits // 32) == words), 0)
        self.check(q, ("I32",), (n, words))
        if not bits:
            raise ModelError(
                f"{self.path}: {q.name} has {words} words for {k} columns; only 4 and 8 bits are supported."
            )
        count = scales.shape[1] if len(scales.shape) == 2 else 1
        self.check(scales, FLOATS, (n, count), (1,), ())
        if zeros is not None:
            self.check(zeros, ("I32",), (-(-n * bits // 32), count))
        groups = None
        if index is not None:
            groups = array_of(index)
            if groups.shape != (k,) or groups.min() < 0 or groups.max() >= count:
                raise ModelError(f"{self.path}: {index.name} names groups that {scales.name} does not have.")
            if k % count == 0 and (groups == np.arange(k) // (k // count)).all():
                groups = None
        elif k % count:
            raise ModelError(f"{self.path}: {k} columns are not {count} groups ({scales.name}).")
        return PackedInts(bits, q, scales, zeros, groups, (n, k))
