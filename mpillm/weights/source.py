"""Where weights come from: one small protocol, and what follows from any source of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import ModelError
from mpillm.kernels.types import QUANT_BLOCK, BlockType
from mpillm.partition import grid
from mpillm.partition.grid import Place, Shape
from mpillm.weights.inventory import HEAD, Flags, Tensors, all_tensors, described, head_tensors, layer_parts
from mpillm.weights.layer import Layer
from mpillm.weights.names import ROLES, Key
from mpillm.weights.paging.cache import Loader
from mpillm.weights.paging.loaders import Kind
from mpillm.weights.plan import LayerPlan


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as it is delivered.

    `shape` is [n, k] or [n], `type` the block type that `read` returns, `stored` the name of the type in the file and
    `nbytes` its size there.
    """

    shape: tuple[int, ...]
    type: BlockType
    stored: str
    nbytes: int


class Source(Protocol):
    """A model's weights and configuration; see `TensorSource` and `PackedSource` for what each method returns."""

    path: Path
    files: tuple[Path, ...]  # that decide the answers, besides those of the tokenizer's directory
    config: dict[str, Any]  # with the keys of Hugging Face's config.json
    tensors: Mapping[Key, TensorInfo]
    # The directory with tokenizer.json (if any), or a GGUF file's tokenizer.* fields.
    tokenizer: Path | dict[str, Any]

    @property
    def loading_nbytes(self) -> int:
        """Bytes that loading takes at most, besides the items themselves."""

    @property
    def files_read_as_stored(self) -> tuple[Path, ...]:
        """Files from which items come byte for byte; none where they are made from what lies in the files."""

    def extents(self) -> Iterator[tuple[Path, int, int]]:
        """Where all tensors lie in the files: file, offset and bytes."""

    def plan(self, part: str, layer: int, tensors: Tensors, shape: Shape, place: Place) -> LayerPlan:
        """What a rank holds of the tensors that are paged in together as a part of a layer."""

    def plan_experts(self, layer: int, shape: Shape, place: Place) -> list[LayerPlan]:
        """What a rank holds of each expert of a layer."""

    def open_loader(
        self, kind: Kind, threads: int, items: Sequence[LayerPlan], streamed: bool
    ) -> Loader[Layer]:
        """The loader of some of the source's items; `streamed`: not all of them stay in memory.

        Experts are loaded several at a time, larger items in several pieces. JobError if there is none of that kind.
        """

    def read_f32(self, key: Key, rows: range | NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """Rows of the embedding table, as float32."""

    def floats(self, key: Key) -> Iterator[NDArray[Any]]:
        """The floating-point numbers that a tensor is stored in, piece by piece: its values, or its blocks' scales."""

    def close(self) -> None:
        """Let go of the files."""


def check_tensors(source: Source, shape: Shape, flags: Flags) -> None:
    """ModelError if a tensor is missing, has another shape than the configuration says, or is not in it at all."""
    known = set()
    for key, dims in all_tensors(shape, flags):
        info = source.tensors.get(key)
        if info is None:
            raise ModelError(f"{source.path} has no tensor for {described(key)}; the model is not complete.")
        if info.shape != dims:
            raise ModelError(
                f"{source.path}: {described(key)} has shape {list(info.shape)}, but the configuration makes it "
                f"{list(dims)}."
            )
        known.add(key)
    for key in source.tensors:
        if key not in known:
            raise ModelError(f"{source.path} has {described(key)}, which its configuration does not have.")


def rank_plans(shape: Shape, place: Place, source: Source, flags: Flags) -> list[LayerPlan]:
    """All that a rank holds, in the order of use: its stage's layers and, on the last stage, the output head.

    `check_tensors` has found the source complete.
    """
    plans = []
    for layer in grid.stage_layers(shape, place):
        for part, tensors in layer_parts(shape, flags, layer).items():
            plans.append(source.plan(part, layer, tensors, shape, place))
        if flags.moe_layers[layer]:
            plans += source.plan_experts(layer, shape, place)
    if place.stage == place.stages - 1:
        plans.append(source.plan(HEAD, -1, list(head_tensors(shape)), shape, place))
    return plans


def column_unit(source: Source) -> int:
    """The granularity of column cuts (`grid.Shape.unit`).

    256 if a matrix that is cut by columns is delivered as K-quants, 32 if any other one is quantised (activations are,
    32 at a time), else 1.
    """
    unit = 1
    for key, info in source.tensors.items():
        if ROLES[key.role].quantisable and info.type.quantised:
            unit = max(unit, info.type.block if ROLES[key.role].cut_by_columns else QUANT_BLOCK)
    return unit
