"""The types in which a source delivers its tensors: as stored, as a job quantises them, or as shards can cut them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mpillm.errors import JobError
from mpillm.kernels.types import SUPER_BLOCK, BlockType
from mpillm.partition.grid import PANELS
from mpillm.weights.formats.extent import Extent
from mpillm.weights.roles import ROLES, Key

QUANTIZE = {"none": None, "q8_0": BlockType.Q8_0, "q4_0": BlockType.Q4_0, "w8a8": BlockType.W8A8}
# What packing can make besides; BF12 of matrices that are stored as BF16.
WIDEN = {"bf16": BlockType.BF16, "f32": BlockType.F32, "bf12": BlockType.BF12}

SCALED_PANELS = 4  # at least, of types whose blocks have a scale in float32


def delivered_types(extents: Mapping[Key, Extent], quantize: BlockType | None) -> Mapping[Key, BlockType]:
    """Return the type of each tensor; `quantize`: what `quantised_to` returned."""
    narrow = {
        extent.stored.type
        for key, extent in extents.items()
        if ROLES[key.role].by_columns and extent.k < _columns_to_cut(extent.stored.type)
    }
    return {key: _delivered(key, extent, quantize, narrow) for key, extent in extents.items()}


def quantised_to(quantize: str) -> BlockType | None:
    """Return the type of matrices by a job's `quantize`; None if they stay as stored. JobError if unknown."""
    types = QUANTIZE | WIDEN
    if quantize not in types:
        raise JobError(f'quantize = "{quantize}" is unknown; it must be one of {", ".join(QUANTIZE)}.')
    return types[quantize]


def check_unquantised(quantize: str, path: Path, extents: Mapping[Key, Extent]) -> None:
    """Raise JobError for a model at `path` that is quantised already, unless it stays as it is."""
    for key, extent in extents.items() if quantised_to(quantize) else ():
        if ROLES[key.role].quantisable and extent.stored.quantised:
            raise JobError(
                f'quantize = "{quantize}" is for unquantised models, but {path} is quantised already '
                f'({extent.name} is {extent.stored.name}); leave quantize = "none".'
            )


def _delivered(
    key: Key, extent: Extent, quantize: BlockType | None, narrow: Iterable[BlockType]
) -> BlockType:
    stored = extent.stored
    if quantize is not None and ROLES[key.role].quantisable:
        as_stored = stored.own and stored.type == quantize.multiplied_as
        if as_stored or not quantize.coded:
            return quantize
    if ROLES[key.role].exact and stored.type is BlockType.BF16:
        return BlockType.F32
    # Blocks of that width would leave too few panels for the shards.
    if ROLES[key.role].by_columns:
        if stored.type.k_quant and any(type.k_quant for type in narrow):
            return BlockType.Q8_0
        if stored.type.scaled and any(type.scaled for type in narrow):
            return BlockType.F32
    return stored.type


def _columns_to_cut(type: BlockType) -> int:
    """Return the minimum of columns that a matrix of this type must have, so that shards can each hold some of them."""
    return PANELS * SUPER_BLOCK if type.k_quant else SCALED_PANELS * type.block if type.scaled else 0
