"""NVFP4 as GGUF files have it: a matrix, and in a tensor of its own the number that all of it is times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mpillm.kernels.scaled_blocks import pack_nibbles
from mpillm.kernels.types import BlockType
from mpillm.weights.formats.extent import Extent, Lies, Made, Recipe, Rows, llama_cpp_rows
from mpillm.weights.formats.gguf_header import GgufHeader, GgufTensor
from mpillm.weights.formats.quantised.scales import floats_of, indices, scaled
from mpillm.weights.formats.recipes import Raw
from mpillm.weights.formats.stored import OWN, Bytes, Stored
from mpillm.weights.io.mapped import MappedFile

NVFP4 = "NVFP4"
BLOCK, BYTES, SCALES = 64, 36, 4  # columns of a block of the file, its bytes, and those of its e4m3 scales
_NAN = 127  # a scale that is none counts as 0 in llama.cpp
_WEIGHT, _WHOLE, _ENDS = ".weight", ".scale", (".scale", ".input_scale")


@dataclass(frozen=True)
class GgufNvfp4:
    """Blocks [.., rows, bytes] of 4 scales and 32 bytes, in whose halves columns j and j + 8 of 16 are."""

    values: Raw
    whole: Raw | None
    stored = OWN[NVFP4]

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, nbytes = self.values.shape
        return (*outer, nbytes // BYTES * BLOCK)

    def of_expert(self, expert: int) -> GgufNvfp4:
        whole = self.whole if self.whole is None or self.whole.shape == (1,) else self.whole[expert]
        return GgufNvfp4(self.values[expert], whole)

    def blocks(self, rows: Rows) -> Bytes:
        raw = self.values.rows(rows)
        raw = raw.reshape(len(raw), -1, BYTES)
        scales, halves = raw[..., :SCALES], raw[..., SCALES:].reshape(*raw.shape[:2], SCALES, 1, -1)
        codes = np.concatenate([halves & 15, halves >> 4], axis=-2).reshape(len(raw), -1)
        whole = np.float32(1) if self.whole is None else floats_of(self.whole)
        return scaled(
            BlockType.NVFP4,
            np.broadcast_to(whole, (len(raw), 1)),
            q=pack_nibbles(codes),
            scales=np.where(scales == _NAN, 0, scales).reshape(len(raw), -1),
        )

    def lies(self) -> Iterator[Lies]:
        yield from self.values.lies()
        if self.whole is not None:
            yield from self.whole.lies()

    def release(self, rows: Rows) -> None:
        self.values.release(rows)


@dataclass(frozen=True)
class InHeads:
    """The result of a recipe, with its rows in the order of llama.cpp's q and k of `heads` heads."""

    recipe: Recipe
    heads: int

    @property
    def stored(self) -> Stored:
        return self.recipe.stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.recipe.shape

    def of_expert(self, expert: int) -> InHeads:
        raise AssertionError("q and k have no experts")

    def blocks(self, rows: Rows) -> Bytes:
        return self.recipe.blocks(llama_cpp_rows(indices(rows), self.shape[0], self.heads))

    def lies(self) -> Iterator[Lies]:
        return self.recipe.lies()

    def release(self, rows: Rows) -> None:
        self.recipe.release(range(self.shape[0]))


def scales_of(parts: Iterable[tuple[MappedFile, GgufHeader]]) -> dict[str, Raw]:
    """Return the factors of matrices in NVFP4 and of their activations, by the tensors' names."""
    parts = list(parts)
    matrices = {
        name.removesuffix(_WEIGHT)
        for _, header in parts
        for name, tensor in header.tensors.items()
        if tensor.stored.name == NVFP4
    }
    return {
        f"{base}{end}": Raw(file, f"{base}{end}", "F32", tensor.shape, tensor.offset, tensor.nbytes)
        for base in matrices
        for end in _ENDS
        for file, header in parts
        if (tensor := header.tensors.get(f"{base}{end}")) is not None
    }


def extent_of(file: MappedFile, name: str, tensor: GgufTensor, scales: dict[str, Raw]) -> Extent:
    """Return the place of a tensor, or its recipe."""
    if tensor.stored.name != NVFP4:
        return Extent(file, name, tensor.offset, tensor.shape, tensor.stored)
    shape = (*tensor.shape[:-1], tensor.shape[-1] // BLOCK * BYTES)
    values = Raw(file, name, "U8", shape, tensor.offset, tensor.nbytes)
    recipe = GgufNvfp4(values, scales.get(name.removesuffix(_WEIGHT) + _WHOLE))
    return Made(file, name, 0, recipe.shape, recipe.stored, recipe=recipe)


def in_heads(extent: Extent, heads: int) -> Extent:
    """Return a tensor whose rows lie as llama.cpp has those of q and k."""
    if isinstance(extent, Made):
        return replace(extent, recipe=InHeads(extent.recipe, heads))
    return replace(extent, rope_heads=heads)
