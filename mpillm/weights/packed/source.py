"""A packed directory as a source: parts are paged in as they lie in the files, embeddings are read by rows."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mpillm.errors import JobError, ModelError
from mpillm.kernels.blocks import PACKED
from mpillm.kernels.coded import decode_panel
from mpillm.kernels.types import TILE_ROWS, BlockType, tile_nbytes
from mpillm.partition.grid import Place
from mpillm.weights.formats.hf import read_config, read_json
from mpillm.weights.formats.quantised import QUANTIZATION
from mpillm.weights.formats.stored import OWN, Floats, Stored, stored_in_gguf
from mpillm.weights.inventory import EXPERT, Inventory, PageSpec, tensor_name
from mpillm.weights.io.reading import read_at, read_pieces
from mpillm.weights.packed.index import (
    PACK_AGAIN,
    PackedFile,
    experts_in,
    listed_files,
    read_packed_file,
    tensor_of,
)
from mpillm.weights.packed.layout import (
    EMBED,
    FORMAT,
    INDEX,
    TOKENIZER,
    TOKENIZER_FILE,
    VERSION,
    Panel,
    panel_name,
    panels_of,
    piece_records,
    shard_extent,
)
from mpillm.weights.packed.loaders import open_packed_loader
from mpillm.weights.page import Page
from mpillm.weights.paging.loaders import Kind
from mpillm.weights.paging.pager import Loader
from mpillm.weights.plan import PagePlan, PageTensor, page_name
from mpillm.weights.roles import Key
from mpillm.weights.source import TensorInfo
from mpillm.weights.text_files import TokenizerSource

ROWS = 256  # rows of the embedding table that are compared together
PIECE = 2**20  # bytes of another tensor
FLOATS: dict[BlockType, Any] = {
    BlockType.F32: np.float32,
    BlockType.F16: np.float16,
    BlockType.BF16: ml_dtypes.bfloat16,
}


class PackedSource:
    """A `Source` whose pages are runs of bytes in `packed_files`."""

    loading_nbytes = 0

    def __init__(self, path: Path, config: dict[str, Any], files: tuple[Path, ...]) -> None:
        """Read the index and the headers; ModelError if anything is missing or not as it was packed."""
        index = read_json(path / INDEX)
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise ModelError(
                f"{path / INDEX} is of format {str(index.get('format'))[:40]!r}, version "
                f"{str(index.get('version'))[:40]}, not {FORMAT!r}, version {VERSION}; {PACK_AGAIN}."
            )
        self.path = path
        self.config = config
        # The index has the hashes of all files, so it stands for them where ranks compare what they see.
        self.files = (*files, path / INDEX)
        fields, own = path / TOKENIZER, path / TOKENIZER_FILE
        self.tokenizer: TokenizerSource = own if own.exists() else path
        if fields.exists():
            self.tokenizer = read_json(fields)
        self.packed_files = tuple(read_packed_file(path, entry) for entry in listed_files(index, path))
        self._where = {name: number for number, file in enumerate(self.packed_files) for name in file.panels}
        self.tensors: Mapping[Key, TensorInfo] = self._tensors()
        self._embed = os.open(self._embed_file.path, os.O_RDONLY | os.O_CLOEXEC)

    def extents(self) -> Iterator[tuple[Path, int, int]]:
        """Yield the place of all panels in the files: file, offset and bytes."""
        for file in self.packed_files:
            for panel in file.panels.values():
                yield file.path, panel.offset, panel.nbytes

    def plan(self, page: PageSpec, model: Inventory, place: Place) -> PagePlan:
        """Return the page plan of a rank: one run of bytes. ModelError if the layout is not that of this version."""
        panels = panels_of(page.tensors, model.max_shards, lambda key: self.tensors[key].type)
        number, begin = self._find(page.kind, page.layer, panels, [(panel.nbytes,) for panel in panels])
        entries, offset, nbytes = shard_extent(panels, place)
        name = page_name(page.kind, page.layer)
        return PagePlan(name, entries, nbytes, page.layer, page.kind, number, begin + offset)

    def plan_experts(self, pages: Sequence[PageSpec], model: Inventory, place: Place) -> list[PagePlan]:
        """Return the page plan of a rank for each of a layer's experts: one run of bytes."""
        layer = pages[0].layer
        panels = panels_of(pages[0].tensors, model.max_shards, lambda key: self.tensors[key].type)
        whole = sum(panel.nbytes for panel in panels)
        number, begin = self._find(EXPERT, layer, panels, [(len(pages), whole)])
        entries, offset, nbytes = shard_extent(panels, place)
        return [
            PagePlan(
                page_name(EXPERT, layer, expert),
                entries,
                nbytes,
                layer,
                EXPERT,
                number,
                begin + expert * whole + offset,
                expert,
            )
            for expert in range(len(pages))
        ]

    def _find(
        self, kind: str, layer: int, panels: list[Panel], shapes: Sequence[tuple[int, ...]]
    ) -> tuple[int, int]:
        """Return the file's number and where the panels begin in it, if they have these shapes; else a ModelError."""
        names = [panel_name(kind, layer, number) for number in range(len(shapes))]
        number = self._where.get(names[0], -1)
        file = self.packed_files[number]
        found = [file.panels[name].shape if name in file.panels else () for name in names]
        wanted, inside = list(piece_records(panels, kind, layer)), set(names)
        if found != list(shapes) or wanted != [row for row in file.table if row.get("panel") in inside]:
            raise ModelError(
                f"{file.path} does not have the layout of its configuration "
                f"({page_name(kind, layer)}); "
                f"{PACK_AGAIN}."
            )
        return number, file.panels[names[0]].offset

    def in_file(self, entry: PageTensor) -> bool:
        """Everything lies there as it is used."""
        return True

    @property
    def files_read_as_stored(self) -> tuple[Path, ...]:
        """The files that hold the pages."""
        return tuple(file.path for file in self.packed_files)

    def open_loader(
        self, kind: Kind, threads: int, pages: Sequence[PagePlan], streamed: bool
    ) -> Loader[Page]:
        """Return the loader of some pages; JobError if this system does not let it map files."""
        return open_packed_loader(self.path, self.packed_files, kind, pages, streamed)

    def read_f32(self, key: Key, rows: range | NDArray[np.integer[Any]] | None = None) -> Floats:
        """Return rows of the embedding table, as precise as they are stored: f32 [m, k]. Each is read from the file."""
        if key != Key(EMBED):
            raise ModelError(
                f"{self.path} is packed, and {tensor_name(key)} cannot be read on its own; run the "
                "model "
                "that was packed."
            )
        n, k = self.tensors[key].shape
        stored, file = self._embed_stored, self._embed_file
        numbers = range(n) if rows is None else np.asarray(rows).tolist()
        begin, nbytes = file.panels[EMBED].offset, stored.row_bytes(k)
        offsets = [begin + number * nbytes for number in numbers]
        return stored.decode(read_pieces(self._embed, file.path, offsets, nbytes), k, threads=1)

    def floats(self, key: Key) -> Iterator[NDArray[Any]]:
        """Yield the values of a tensor, or the scales of its blocks, piece by piece."""
        if key == Key(EMBED):
            for first in range(0, self.tensors[key].shape[0], ROWS):
                yield self.read_f32(key, range(first, min(first + ROWS, self.tensors[key].shape[0])))
            return
        for file, row in self._pieces[key._replace(expert=min(key.expert, 0))]:
            panel, type = file.panels[row["panel"]], BlockType[row["type"]]
            begin = panel.offset + row["offset"]
            if key.expert > 0:
                begin += key.expert * (panel.nbytes // panel.shape[0])
            with file.path.open("rb") as opened:
                for columns, nbytes, unit in _runs(type, row):
                    step, end = max(PIECE // unit, 1) * unit, begin + nbytes
                    for at in range(begin, end, step):
                        raw = np.empty(min(step, end - at), np.uint8)
                        read_at(opened.fileno(), file.path, at, raw)
                        yield from _floats(type, raw, columns)
                    begin = end

    @cached_property
    def _pieces(self) -> dict[Key, list[tuple[PackedFile, dict[str, Any]]]]:
        """The description of each tensor's pieces; those of all experts are with the first expert."""
        found: dict[Key, list[tuple[PackedFile, dict[str, Any]]]] = {}
        for file in self.packed_files:
            for row in file.table:
                found.setdefault(tensor_of(row)[0], []).append((file, row))
        return found

    def close(self) -> None:
        """Let go of the embedding's file."""
        if self._embed >= 0:
            os.close(self._embed)
            self._embed = -1

    @property
    def _embed_file(self) -> PackedFile:
        return self.packed_files[self._where[EMBED]]

    def _tensors(self) -> dict[Key, TensorInfo]:
        found: dict[Key, TensorInfo] = {}
        for file in self.packed_files:
            try:
                experts: dict[Key, int] = {}
                for row in file.table:
                    key, info = tensor_of(row)
                    n, k = (0, 0) if key not in found else (*found[key].shape, 0)[:2]
                    size = 0 if key not in found else found[key].nbytes
                    shape = (max(n, info.shape[0]), *(max(k, width) for width in info.shape[1:]))
                    if row["repeated"]:
                        info = TensorInfo(info.shape, info.type, info.stored, 0)
                    found[key] = TensorInfo(shape, info.type, info.stored, size + info.nbytes)
                    if key.expert >= 0:
                        experts[key] = experts_in(file.panels[row["panel"]])
                for key, count in experts.items():
                    found.update((key._replace(expert=expert), found[key]) for expert in range(1, count))
            except (KeyError, TypeError, ValueError, IndexError, OverflowError):
                raise ModelError(
                    f"{file.path} does not describe its panels as version {VERSION} does; {PACK_AGAIN}."
                ) from None
        if EMBED not in self._where:
            raise ModelError(f"{self.path} has no embedding table; {PACK_AGAIN}.")
        found[Key(EMBED)] = self._describe_embed()
        return found

    def _describe_embed(self) -> TensorInfo:
        file = self._embed_file
        tensor, name = file.panels[EMBED], file.metadata.get("stored", "")
        stored, k = _stored(name), file.metadata.get("columns", "")
        if stored is None or not k.isdecimal() or len(tensor.shape) != 2 or not stored.fits(int(k)):
            raise ModelError(f"{file.path} does not say how its rows are stored; {PACK_AGAIN}.")
        self._embed_stored = stored
        if tensor.nbytes != tensor.shape[0] * stored.row_bytes(int(k)):
            raise ModelError(f"{file.path} has rows of another size than {k} values of {name}; {PACK_AGAIN}.")
        return TensorInfo((tensor.shape[0], int(k)), stored.type, name, tensor.nbytes)


def _runs(type: BlockType, row: dict[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Yield the parts of a piece that lie one behind the other: columns, bytes, bytes that belong together."""
    if not type.coded and not type.whole:
        unit = PACKED[type].itemsize if type.block > 1 else type.block_bytes
        yield 0, row["nbytes"], unit
        return
    tiles = -(-(row["rows"][1] - row["rows"][0]) // TILE_ROWS)
    for first, last in itertools.pairwise(row["bounds"]):
        if last > first:
            yield last - first, tiles * tile_nbytes(type, last - first), tile_nbytes(type, last - first)


def _floats(type: BlockType, packed: NDArray[np.uint8], columns: int) -> Iterator[NDArray[Any]]:
    """Yield the values of kernel-ready bytes (some types have tiles of `columns` columns), or their blocks' scales."""
    if type.coded:
        rows = decode_panel(packed, packed.nbytes // tile_nbytes(type, columns) * TILE_ROWS, columns)
        yield rows.view(FLOATS[type.multiplied_as])
    elif type.whole:
        yield packed.reshape(-1, tile_nbytes(type, columns))[:, : 4 * TILE_ROWS].copy().view(np.float32)
    elif type.block > 1:
        blocks = packed.view(PACKED[type])
        yield from (blocks[name] for name in ("d", "m") if name in (blocks.dtype.names or ()))
    else:
        yield packed.view(FLOATS[type])


def open_packed(path: Path, quantize: str) -> PackedSource:
    """Return the model in a packed directory; ModelError if it is not complete or not sound."""
    if quantize != "none":
        raise JobError(
            f'quantize = "{quantize}" is for unquantised models, but {path} is packed already; leave quantize = '
            f'"none", or pack its source with --weights {quantize}.'
        )
    config, files = read_config(path)
    config.pop(QUANTIZATION, None)  # the quantisation of the model that was packed
    return PackedSource(path, config, files)


def _stored(name: str) -> Stored | None:
    if name in OWN:
        return OWN[name]
    import gguf

    try:
        return stored_in_gguf(gguf.GGMLQuantizationType[name])
    except KeyError:
        return None
