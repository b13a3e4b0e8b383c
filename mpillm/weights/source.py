"""The sources of weights: one small protocol, and the plans that follow from any source."""

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
from mpillm.partition.grid import Place
from mpillm.weights.inventory import Inventory, PageSpec, all_tensors, tensor_name
from mpillm.weights.page import Page
from mpillm.weights.paging.loaders import Kind
from mpillm.weights.paging.pager import Loader
from mpillm.weights.plan import PagePlan, PageTensor
from mpillm.weights.roles import ROLES, TASK_ROLES, Key
from mpillm.weights.text_files import TokenizerSource


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
    files: tuple[Path, ...]  # the files that decide the answers, besides those of the tokenizer's directory
    config: dict[str, Any]  # with the keys of Hugging Face's config.json
    tensors: Mapping[Key, TensorInfo]
    tokenizer: TokenizerSource

    @property
    def loading_nbytes(self) -> int:
        """Bytes that loading takes at most, besides the pages themselves."""

    @property
    def files_read_as_stored(self) -> tuple[Path, ...]:
        """Files from which pages come byte for byte; none where they are made from what lies in the files."""

    def in_file(self, entry: PageTensor) -> bool:
        """Return whether what is planned can be used where it lies in its file: what stays is mapped then, not read."""

    def extents(self) -> Iterator[tuple[Path, int, int]]:
        """Return the place of all tensors in the files: file, offset and bytes."""

    def plan(self, page: PageSpec, model: Inventory, place: Place) -> PagePlan:
        """Return the page plan of a rank."""

    def plan_experts(self, pages: Sequence[PageSpec], model: Inventory, place: Place) -> list[PagePlan]:
        """Return the page plan of a rank for each of a layer's experts."""

    def open_loader(
        self, kind: Kind, threads: int, pages: Sequence[PagePlan], streamed: bool
    ) -> Loader[Page]:
        """Return the loader of some of the source's pages; `streamed`: not all of them stay in memory.

        Experts are loaded several at a time, larger pages in several pieces. JobError if there is none of that kind.
        """

    def read_f32(self, key: Key, rows: range | NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """Return rows of the embedding table, as float32."""

    def floats(self, key: Key) -> Iterator[NDArray[Any]]:
        """Return the floating-point numbers of a stored tensor, piece by piece: its values, or its blocks' scales."""

    def close(self) -> None:
        """Let go of the files."""


def check_tensors(source: Source, model: Inventory) -> None:
    """Raise ModelError if a tensor is missing, has another shape than the configuration says, or is unknown to it."""
    known = set()
    for tensor in all_tensors(model):
        info = source.tensors.get(tensor.key)
        if info is None:
            raise ModelError(
                f"{source.path} has no tensor for {tensor_name(tensor.key)}; the model is not complete."
            )
        if info.shape != tensor.shape:
            raise ModelError(
                f"{source.path}: {tensor_name(tensor.key)} has shape {list(info.shape)}, but the configuration makes "
                f"it {list(tensor.shape)}."
            )
        known.add(tensor.key)
    for key in source.tensors:
        if key not in known and key.role not in TASK_ROLES and not _is_zero_bias(source, key):
            raise ModelError(f"{source.path} has {tensor_name(key)}, which its configuration does not have.")


def _is_zero_bias(source: Source, key: Key) -> bool:
    """Return whether it changes nothing: some who quantise give every matrix a bias."""
    return key.role.endswith("_bias") and not source.read_f32(key).any()


def weight_types(source: Source) -> list[str]:
    """Return the stored types of matrices and what they become, as "FP8 as F16"; most bytes come first."""
    sizes: dict[str, int] = {}
    for info in source.tensors.values():
        if len(info.shape) == 2:
            name = info.stored if info.stored == info.type.name else f"{info.stored} as {info.type.name}"
            sizes[name] = sizes.get(name, 0) + info.nbytes
    return sorted(sizes, key=lambda name: -sizes[name])


def rank_plans(model: Inventory, place: Place, source: Source) -> list[PagePlan]:
    """Return all that a rank holds, in the order of use: its stage's layers and, on the last stage, the LM head.

    `check_tensors` has found the source complete.
    """
    plans = []
    for layer in grid.stage_layers(model.n_layers, place):
        plans += layer_plans(model, layer, place, source)
    return plans + head_plans(model, place, source)


def layer_plans(model: Inventory, layer: int, place: Place, source: Source) -> list[PagePlan]:
    """Return the pages of a layer on a rank of the layer's stage."""
    plans = [source.plan(page, model, place) for page in model.pages(layer)]
    if experts := model.experts(layer):
        plans += source.plan_experts(experts, model, place)
    return plans


def head_plans(model: Inventory, place: Place, source: Source) -> list[PagePlan]:
    """Return the LM head's page, if the rank holds a part of it."""
    if place.is_last_stage and model.head.tensors:
        return [source.plan(model.head, model, place)]
    return []


def column_unit(source: Source) -> int:
    """Return the granularity of column cuts: the `block` of `grid.axis`.

    The largest block of a matrix that is cut by columns, such as 256 of K-quants; 32 if any other one is quantised
    (activations are, 32 at a time), else 1.
    """
    unit = 1
    for key, info in source.tensors.items():
        if ROLES[key.role].quantisable:
            rounded = QUANT_BLOCK if info.type.quantised else 1
            unit = max(unit, info.type.block if ROLES[key.role].by_columns else rounded)
    return unit
