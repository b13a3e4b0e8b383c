"""The index of a packed directory: the names and sizes of its files, the panels in each, and their tensors."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpillm.errors import ModelError
from mpillm.kernels.types import BlockType
from mpillm.weights.formats.safetensors import SafetensorsTensor, read_metadata
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.names import USUAL, Parsed
from mpillm.weights.packed.layout import INDEX, VERSION
from mpillm.weights.roles import Key
from mpillm.weights.source import TensorInfo

PACK_AGAIN = "pack the model again"
MAX_EXPERTS = 65_536  # the maximum number of experts of a layer; a file with more does not describe a model


@dataclass(frozen=True)
class PackedFile:
    """One file: `size` bytes, panels by name, and what its metadata says of them."""

    path: Path
    size: int
    panels: dict[str, SafetensorsTensor]
    metadata: dict[str, str]
    table: list[dict[str, Any]] = field(default_factory=list)


def listed_files(index: dict[str, Any], path: Path) -> list[tuple[str, int]]:
    """Return the names of the files in an index and their bytes; ModelError if it does not list them."""
    try:
        files = [(str(entry["name"]), int(entry["bytes"])) for entry in index["files"]]
    except (KeyError, TypeError, ValueError, OverflowError):  # the last: 1e999
        raise ModelError(f"{path / INDEX} does not list the model's files; {PACK_AGAIN}.") from None
    if any(name in ("", ".", "..") or Path(name).name != name for name, _ in files):
        raise ModelError(f"{path / INDEX} names a file outside of {path}; {PACK_AGAIN}.")
    return files


def read_packed_file(folder: Path, entry: tuple[str, int]) -> PackedFile:
    """Read the header of a file of the index; ModelError if the file is missing or not as it was packed."""
    path, size = folder / entry[0], entry[1]
    if not os.path.exists(path):
        raise ModelError(f"{folder / INDEX} names {path.name}, which is missing; {PACK_AGAIN}.")
    file = MappedFile(path)
    try:
        if file.size != size:
            raise ModelError(f"{path} has {file.size} bytes, not {size} as when it was packed; {PACK_AGAIN}.")
        panels, metadata = read_metadata(file)
    finally:
        file.close()
    try:
        table = json.loads(metadata.get("pieces", "[]"))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise ModelError(f"{path} does not describe its panels as version {VERSION} does; {PACK_AGAIN}.")
    return PackedFile(path, size, panels, metadata, table)


def tensor_of(row: dict[str, Any]) -> tuple[Key, TensorInfo]:
    """Return a piece's tensor, as large as the piece shows it; KeyError, TypeError or ValueError if it is none."""
    # Experts that are alike have one record, which names the first of them here.
    parsed = _parsed(row["tensor"].replace(".experts.*.", ".experts.0."))
    if parsed is None:
        raise ValueError(row["tensor"])
    type = BlockType[row["type"]]
    rows, cols = int(row["rows"][1]), int(row["cols"][1])
    shape = (rows, cols) if row["bounds"] else (rows,)
    return Key(parsed.roles[0], parsed.layer, parsed.expert), TensorInfo(
        shape, type, type.name, int(row["nbytes"])
    )


@functools.lru_cache(1 << 14)
def _parsed(name: str) -> Parsed | None:
    """Return the key of a tensor. Each panel of the tensor asks for it, twice at a start."""
    return USUAL.parse_hf(name)


def experts_in(tensor: SafetensorsTensor) -> int:
    """Return the number of experts in a panel; ValueError if it is more than any model has."""
    count = tensor.shape[0]
    if count > MAX_EXPERTS:
        raise ValueError(count)
    return count
