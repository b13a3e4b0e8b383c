"""Adapters as they lie in files: for some of a model's matrices two factors each, whose product is added (LoRA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpillm.errors import ModelError
from mpillm.weights.formats.extent import Extent
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.names import Parsed, RowGroups
from mpillm.weights.text_files import TokenizerSource


@dataclass(frozen=True)
class Factors:
    """The sum that is added to a tensor of the model: `scale` b a, with a [r, k] and b [n, r].

    `parsed` is what the tensor is, `name` what the file calls it; `groups` as in `matrices.place`.
    """

    name: str
    parsed: Parsed
    a: Extent
    b: Extent
    scale: float
    groups: RowGroups


class AdapterFiles:
    """An opened adapter; `path` is its directory or its file, `files` are all that decide what it does."""

    def __init__(
        self, path: Path, files: tuple[Path, ...], mapped: MappedFile, factors: list[Factors]
    ) -> None:
        self.path, self.files, self.factors = path, files, factors
        self.tokenizer: TokenizerSource = {}  # it has none of its own
        self._mapped = mapped

    def extents(self) -> Iterator[tuple[Path, int, int]]:
        """Yield the place of all tensors in the files: file, offset and bytes."""
        for factors in self.factors:
            for extent in (factors.a, factors.b):
                yield extent.file.path, extent.offset, extent.nbytes

    def close(self) -> None:
        """Unmap the file."""
        self._mapped.close()


def pairs_of(file: MappedFile, found: Mapping[str, Mapping[str, Extent]]) -> dict[str, tuple[Extent, Extent]]:
    """Return both factors, "A" and "B", of each module; ModelError if one is missing, or they cannot be multiplied."""
    if not found:
        raise ModelError(f"{file.path} contains no tensors.")
    pairs = {}
    for module, factors in found.items():
        if len(factors) < 2:
            raise ModelError(f"{file.path} has only one of the two factors of {module[:80]!r}.")
        a, b = factors["A"], factors["B"]
        for factor in (a, b):
            if len(factor.shape) != 2 or 0 in factor.shape:
                raise ModelError(
                    f"{file.path}: tensor {factor.name} has shape {list(factor.shape)}, but must be a matrix."
                )
        if a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{file.path}: the factors of {module[:80]!r} have shapes {list(a.shape)} and {list(b.shape)}, which "
                "cannot be multiplied."
            )
        pairs[module] = a, b
    return pairs
