"""Plan the files of a packed model: their pages, headers and sizes. Nothing is written here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpillm.errors import ModelError
from mpillm.kernels.types import BlockType
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.inventory import Inventory, PageSpec
from mpillm.weights.packed.layout import (
    EMBED,
    FORMAT,
    PAGE,
    VERSION,
    Panel,
    layer_file,
    panel_name,
    panels_of,
    piece_records,
)
from mpillm.weights.plan import aligned
from mpillm.weights.roles import Key

_DTYPES = (BlockType.F32, BlockType.F16, BlockType.BF16)  # the types whose names safetensors knows


@dataclass(frozen=True)
class PackedPage:
    """A page as it is stored. An expert has the panels of the layer's first one."""

    kind: str
    layer: int
    panels: tuple[Panel, ...]
    expert: int = -1

    @property
    def nbytes(self) -> int:
        return sum(panel.nbytes for panel in self.panels)


@dataclass(frozen=True)
class FilePlan:
    """A file to write: its pages, or the embedding table (`pages` is empty), as `data_bytes` bytes."""

    name: str
    header: dict[str, Any]
    pages: tuple[PackedPage, ...]
    data_bytes: int

    def head(self, digest: str) -> bytes:
        """Return the file's header; its length does not depend on the hash `digest` of the data."""
        metadata = self.header["__metadata__"] | {"sha256": digest}
        text = json.dumps(self.header | {"__metadata__": metadata}, separators=(",", ":")).encode()
        length = aligned(8 + len(text), PAGE) - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    @property
    def nbytes(self) -> int:
        return len(self.head("0" * 64)) + self.data_bytes


def plan_files(source: TensorSource, model: Inventory, about: dict[str, str]) -> list[FilePlan]:
    """Return all files of a model; each has the metadata `about`, which names its source."""

    def packed(page: PageSpec) -> PackedPage:
        panels = panels_of(page.tensors, model.max_shards, lambda key: source.tensors[key].type)
        return PackedPage(page.kind, page.layer, tuple(panels))

    about = {"format": FORMAT, "version": str(VERSION), **about}
    plans = []
    for layer in range(model.n_layers):
        pages = [packed(page) for page in model.pages(layer)]
        if experts := model.experts(layer):
            pages += _experts(source, experts, packed(experts[0]))
        plans.append(_plan(layer_file(layer), tuple(pages), about))
    plans.append(_plan("head.safetensors", (packed(model.head),), about))
    return [*plans, _plan_embed(source, about)]


def _experts(source: TensorSource, experts: Sequence[PageSpec], first: PackedPage) -> Iterator[PackedPage]:
    """Yield a layer's experts, all like the first one; ModelError if they are not of the same types."""
    for page in experts:
        for tensor, like in zip(page.tensors, experts[0].tensors, strict=True):
            if source.tensors[tensor.key].type != source.tensors[like.key].type:
                raise ModelError(
                    f"{source.path}: the experts of layer {page.layer} are of different types, which cannot be packed; "
                    "name one with --weights."
                )
        yield replace(first, expert=page.expert)


def _plan(name: str, pages: tuple[PackedPage, ...], about: dict[str, str]) -> FilePlan:
    header: dict[str, Any] = {}
    pieces: list[dict[str, Any]] = []
    offset = 0
    experts = sum(page.expert >= 0 for page in pages)
    for page in pages:
        if page.expert > 0:  # is like the first one, and lies in the same tensor
            continue
        pieces += piece_records(list(page.panels), page.kind, page.layer)
        one = page.expert == 0
        for number, dims in enumerate(
            [(experts, page.nbytes)] if one else [(p.nbytes,) for p in page.panels]
        ):
            end = offset + math.prod(dims)
            tensor = {"dtype": "U8", "shape": list(dims), "data_offsets": [offset, end]}
            header[panel_name(page.kind, page.layer, number)] = tensor
            offset = end
    metadata = {**about, "pieces": json.dumps(pieces, separators=(",", ":"))}
    return FilePlan(name, {"__metadata__": metadata, **header}, pages, offset)


def _plan_embed(source: TensorSource, about: dict[str, str]) -> FilePlan:
    n, k = source.tensors[Key(EMBED)].shape
    stored, _ = source.stored_rows(Key(EMBED), range(0))
    plain = stored.own and stored.type in _DTYPES
    shape = [n, k] if plain else [n, stored.row_bytes(k)]
    size = n * stored.row_bytes(k)
    metadata = {**about, "stored": stored.name, "columns": str(k)}
    tensor = {"dtype": stored.name if plain else "U8", "shape": shape, "data_offsets": [0, size]}
    return FilePlan(f"{EMBED}.safetensors", {"__metadata__": metadata, EMBED: tensor}, (), size)
