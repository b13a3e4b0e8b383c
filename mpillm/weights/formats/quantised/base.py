"""The common part of methods of quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Recipe
from mpillm.weights.formats.quantised.scales import Ints, array_of
from mpillm.weights.formats.recipes import Raw


class Method:
    """Takes the tensors of a checkpoint that belong to quantised matrices, and says how these are made of them."""

    def __init__(self, config: Mapping[str, Any], path: str | Path) -> None:
        """`config` is the checkpoint's quantization_config; ModelError if it asks for what is not supported."""
        self.config, self.path = config, path

    def take(self, tensors: dict[str, Raw]) -> Iterator[tuple[str, Recipe]]:
        """Return names and recipes of quantised matrices, and remove their tensors; ModelError if one is missing."""
        raise NotImplementedError

    def part(self, tensors: dict[str, Raw], name: str) -> Raw:
        """Remove a tensor that a matrix needs, and return it; ModelError if it is missing."""
        found = tensors.pop(name, None)
        if found is None:
            raise ModelError(f"{self.path} has no tensor {name}; the model is not complete.")
        return found

    def drop(self, tensors: dict[str, Raw], *ends: str) -> None:
        """Remove tensors that only rounding of activations needs, by how their names end."""
        for name in [name for name in tensors if name.endswith(ends)]:
            del tensors[name]

    def check(self, raw: Raw, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        """Raise ModelError if a tensor is of another type, or of none of these shapes."""
        if raw.dtype not in dtypes or raw.shape not in shapes:
            raise ModelError(
                f"{raw.file.path}: tensor {raw.name} is {raw.dtype} {list(raw.shape)}, but must be "
                f"{' or '.join(dtypes)} {' or '.join(str(list(shape)) for shape in shapes)}."
            )

    def sizes_of(self, raw: Raw, dtype: str) -> tuple[int, int]:
        """Return the two sizes of a matrix; ModelError if the tensor is none, or of another type."""
        if raw.dtype != dtype or len(raw.shape) != 2:
            raise ModelError(
                f"{raw.file.path}: tensor {raw.name} is {raw.dtype} {list(raw.shape)}, but must be a matrix of {dtype}."
            )
        return raw.shape[0], raw.shape[1]

    def groups_of(self, columns: int, count: int, scales: Raw, index: Raw | None = None) -> Ints | None:
        """Return the group of each column, None if groups follow one another; ModelError if there are not `count`.

        `index`, if there is one, names the group of each column; `scales` has one for each group.
        """
        if index is None:
            if not count or columns % count:
                raise ModelError(f"{self.path}: {columns} columns are not {count} groups ({scales.name}).")
            return None
        groups = array_of(index)
        if groups.shape != (columns,) or groups.min() < 0 or groups.max() >= count:
            raise ModelError(f"{self.path}: {index.name} names groups that {scales.name} does not have.")
        in_turn = columns % count == 0 and (groups == np.arange(columns) // (columns // count)).all()
        return None if in_turn else groups
