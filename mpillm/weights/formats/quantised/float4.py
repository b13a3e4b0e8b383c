"""Numbers of 4 bits with a table: NVFP4 (e2m1 in blocks of 16) and bitsandbytes' nf4 and fp4."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from mpillm.errors import ModelError
from mpillm.kernels.scaled_blocks import NF4, pack_nibbles
from mpillm.kernels.types import BlockType
from mpillm.weights.formats.extent import Lies, Recipe, Rows
from mpillm.weights.formats.quantised.base import Method
from mpillm.weights.formats.quantised.float8 import float8, take_float8
from mpillm.weights.formats.quantised.integers import Int8
from mpillm.weights.formats.quantised.scales import (
    FLOATS,
    array_of,
    floats_of,
    indices,
    scaled,
    stored_as,
    to_f16,
)
from mpillm.weights.formats.recipes import Raw, halves_apart, turned
from mpillm.weights.formats.stored import OWN, Bytes, Floats, Stored

NVFP4_BLOCK = 16
# Bytes of the types that bitsandbytes stores pairs of nibbles as.
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Nvfp4:
    """e2m1 numbers, even columns in low halves of bytes, times e4m3 scales of 16 columns, times or by a third one."""

    values: Raw
    scales: Raw
    whole: Raw
    divides: bool
    stored = OWN[BlockType.NVFP4.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.values.shape[:-1], 2 * self.values.shape[-1]

    def of_expert(self, expert: int) -> Nvfp4:
        own = self.whole[expert] if self.whole.shape[:1] == self.values.shape[:1] else self.whole
        return replace(self, values=self.values[expert], scales=self.scales[expert], whole=own)

    def blocks(self, rows: Rows) -> Bytes:
        raw = self.values.rows(rows)
        if (
            raw.shape[1] % NVFP4_BLOCK
        ):  # 16 columns are left, which the others that they share bytes with lack
            raw = np.pad(raw, ((0, 0), (0, NVFP4_BLOCK - raw.shape[1] % NVFP4_BLOCK)))
        whole = floats_of(self.whole).reshape(1, 1)
        with np.errstate(divide="ignore"):
            unit = 1 / whole if self.divides else whole
        q = halves_apart(raw.reshape(len(raw), -1, 2, NVFP4_BLOCK // 2)).reshape(len(raw), -1)
        units: Floats = np.repeat(unit, len(raw), axis=0)
        return scaled(BlockType.NVFP4, units, q=q, scales=self.scales.bytes()[indices(rows)])

    def lies(self) -> Iterator[Lies]:
        for raw in (self.values, self.scales, self.whole):
            yield from raw.lies()

    def release(self, rows: Rows) -> None:
        self.values.release(rows)


def nvfp4(method: Method, values: Raw, scales: Raw, whole: Raw, divides: bool) -> Nvfp4:
    """Return the recipe of NVFP4; ModelError if its tensors do not go together."""
    *outer, half = (*values.shape, 0)[: max(len(values.shape), 2)]
    experts = tuple(outer[:-1])
    method.check(values, ("U8",), (*outer, half))
    method.check(scales, ("F8_E4M3",), (*outer, 2 * half // NVFP4_BLOCK))
    method.check(whole, FLOATS, (), (1,), experts, (*experts, 1))
    return Nvfp4(values, scales, whole, divides)


class ModelOptMethod(Method):
    """`modelopt`: NVFP4 with X_scale and X_scale_2, FP8 and MXFP8 with X_scale, or some of each."""

    algorithms: ClassVar[tuple[str, ...]] = (
        "NVFP4",
        "W4A16_NVFP4",
        "FP8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8_PB_WO",
        "MXFP8",
        "MIXED_PRECISION",
    )

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        nested = self.config.get("quantization")
        algorithm = (nested if isinstance(nested, Mapping) else self.config).get("quant_algo")
        if not isinstance(algorithm, str) or algorithm.upper() not in self.algorithms:
            raise ModelError(
                f"{self.path}: modelopt with quant_algo {str(algorithm)[:40]!r} is not supported; "
                f"supported: {', '.join(self.algorithms)}."
            )
        for name in [name for name in tensors if f"{name}_scale_2" in tensors]:
            values, scales, whole = (self.part(tensors, name + end) for end in ("", "_scale", "_scale_2"))
            yield name, nvfp4(self, values, scales, whole, divides=False)
        yield from self._stacked(tensors)
        for name, raw in tensors.items():  # of blocks, [rows, 1, columns, 1]
            if name.endswith("_scale") and len(raw.shape) == 4 and raw.shape[1::2] == (1, 1):
                tensors[name] = replace(raw, shape=raw.shape[::2])
        yield from take_float8(self, tensors, (128, 128))

    def _stacked(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        """Yield experts of a layer that lie transposed in one tensor (Llama 4, gpt-oss)."""
        for name in [name for name in tensors if f"{name}_weight_scale" in tensors]:
            values, scales = tensors.pop(name), self.part(tensors, f"{name}_weight_scale")
            if len(values.shape) != 3 or values.nbytes != math.prod(values.shape):
                raise ModelError(
                    f"{values.file.path}: tensor {name} is no tensor of all experts in FP8 or NVFP4."
                )
            if (whole := tensors.pop(f"{name}_weight_scale_2", None)) is None:
                yield name, float8(self, turned(values), scales, ())
            elif len(scales.shape) != 3:
                raise ModelError(f"{values.file.path}: tensor {scales.name} has no scales of {name}.")
            else:
                yield name, nvfp4(self, turned(values), turned(scales), whole, divides=False)
        self.drop(tensors, "_proj_input_scale")


@dataclass(frozen=True)
class Nf4:
    """Numbers of a table of 16, two in a byte, the first in the upper half, times the scale of `block` of them."""

    values: Raw
    table: Raw
    scales: Raw
    nested: tuple[Raw, Raw, int, float] | None  # scales' own scales, their table, block, and what is added
    block: int
    shape: tuple[int, int]

    @cached_property
    def stored(self) -> Stored:
        """Blocks of NF4, or F16 with another table, or where such a block would need several scales."""
        each = BlockType.NF4.block
        own = self.shape[1] % each == 0 and self.block % each == 0 and (floats_of(self.table) == NF4).all()
        return stored_as("NF4", BlockType.NF4 if own else BlockType.F16)

    def of_expert(self, expert: int) -> Nf4:
        raise AssertionError("each expert has tensors of its own")

    def blocks(self, rows: Rows) -> Bytes:
        index, (_, k) = indices(rows), self.shape
        places = index[:, None] * k + np.arange(k)
        codes = self.values.file.view(self.values.offset, self.values.nbytes)[places // 2]
        nibbles = np.where(places % 2, codes & np.uint8(15), codes >> np.uint8(4))
        if self.stored.type is BlockType.NF4:
            begins = index[:, None] * k + np.arange(0, k, BlockType.NF4.block)
            return scaled(BlockType.NF4, self._scales[begins // self.block], q=pack_nibbles(nibbles))
        numbers = floats_of(self.table)[nibbles]
        return to_f16(numbers * self._scales[places // self.block])

    @cached_property
    def _scales(self) -> Floats:
        scales = array_of(self.scales).ravel()
        if self.nested is None:
            return scales.astype(np.float32)
        own, table, block, offset = self.nested
        found: Floats = floats_of(table)[scales] * np.repeat(floats_of(own), block)[: len(scales)]
        found += np.float32(offset)
        return found

    def lies(self) -> Iterator[Lies]:
        for raw in (self.values, self.table, self.scales, *(self.nested[:2] if self.nested else ())):
            yield from raw.lies()

    def release(self, rows: Rows) -> None:
        self.values.release()


class BitsAndBytesMethod(Method):
    """`bitsandbytes`: 4 bits with X.quant_state.*, or int8 X with X's row scales in SCB."""

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        marks = [name for name in tensors if ".quant_state.bitsandbytes__" in name]
        for mark in marks:
            name = mark.split(".quant_state.")[0]
            yield name, self._nf4(tensors, name, tensors.pop(mark))
        for name in [name for name in tensors if name.endswith(".SCB")]:
            base = name.removesuffix("SCB") + "weight"
            values, scales = self.part(tensors, base), tensors.pop(name)
            tensors.pop(f"{base}_format", None)
            rows, columns = (*values.shape, 0)[:2]
            self.check(values, ("I8",), (rows, columns))
            self.check(scales, ("F32",), (rows,))
            yield base, Int8(values, scales, factor=1 / 127)

    def _nf4(self, tensors: dict[str, Raw], name: str, mark: Raw) -> Nf4:
        state = self._state(mark)
        n, k = state["shape"]
        values, table, scales = (self.part(tensors, name + end) for end in ("", ".quant_map", ".absmax"))
        count = -(-n * k // state["blocksize"])
        nested = None
        if f"{name}.nested_absmax" in tensors:
            own, inner = (
                self.part(tensors, f"{name}.{end}") for end in ("nested_absmax", "nested_quant_map")
            )
            block = state["nested_blocksize"]
            self.check(own, ("F32",), (-(-count // block),))
            self.check(inner, ("F32",), (256,))
            nested = (own, inner, block, float(state["nested_offset"]))
        # Training shards them under the names of other types (bnb_4bit_quant_storage).
        size = -(-n * k // (2 * _STORAGE.get(values.dtype, 1)))
        self.check(values, tuple(_STORAGE), (size, 1), (size,))
        self.check(table, ("F32",), (16,))
        self.check(scales, ("F32",) if nested is None else ("U8",), (count,))
        return Nf4(values, table, scales, nested, state["blocksize"], (n, k))

    def _state(self, mark: Raw) -> Mapping[str, Any]:
        """Return the notes of bitsandbytes on a matrix, as JSON in a tensor of bytes."""
        try:
            state = json.loads(mark.file.view(mark.offset, mark.nbytes).tobytes())
            n, k = state["shape"]
            sizes = (n, k, state["blocksize"], state.get("nested_blocksize", 1))
            if all(type(size) is int and size > 0 for size in sizes):
                return {"nested_offset": 0.0, "nested_blocksize": 1, **state}
        except (ValueError, KeyError, TypeError):
            pass
        raise ModelError(f"{mark.file.path}: tensor {mark.name} is not a state of bitsandbytes.")
