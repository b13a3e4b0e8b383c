"""Tensors in mapped files, read slice by slice: what every kind of source comes down to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.kernels.types import BlockType, used_as_stored
from mpillm.partition.grid import Place
from mpillm.weights.fill import UNDER_WAY, Rows
from mpillm.weights.formats.delivered import QUANTIZE, check_unquantised, delivered_types, quantised_to
from mpillm.weights.formats.extent import Extent, llama_cpp_rows
from mpillm.weights.formats.in_place import StoredRows
from mpillm.weights.formats.loaders import LOADING_NBYTES, open_unpacked_loader
from mpillm.weights.formats.stored import Bytes, Floats, Stored
from mpillm.weights.inventory import Inventory, PageSpec
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.page import Page
from mpillm.weights.paging.loaders import Kind
from mpillm.weights.paging.pager import Loader
from mpillm.weights.plan import PagePlan, PageTensor, page_name, plan_entries
from mpillm.weights.roles import Key
from mpillm.weights.source import TensorInfo
from mpillm.weights.text_files import TokenizerSource

PIECE = 2**20  # bytes of a tensor that is looked at piece by piece


class TensorSource:
    """A `Source` over mapped files; safetensors and GGUF differ only in what they put in here."""

    files_read_as_stored: tuple[Path, ...] = ()

    def __init__(
        self,
        path: Path,
        files: Iterable[MappedFile],
        metadata_files: Iterable[Path],
        extents: Mapping[Key, Extent],
        config: dict[str, Any],
        tokenizer: TokenizerSource,
        quantize: str = "none",
    ) -> None:
        """`metadata_files` are those that are read whole (config.json): they count in the fingerprint."""
        self.path = path
        self.config = config
        self.tokenizer = tokenizer
        self.mapped = tuple(files)
        self.files = (*metadata_files, *(file.path for file in self.mapped))
        self._extents = dict(extents)
        types = delivered_types(self._extents, quantised_to(quantize))
        # What shards hold of pages, and of all experts of a layer: who looks for a layout asks for the same again.
        self._plans: dict[tuple[PageSpec, int, int], PagePlan] = {}
        self._expert_plans: dict[tuple[PageSpec, int, int], list[PagePlan]] = {}
        self.tensors: Mapping[Key, TensorInfo] = {
            key: TensorInfo(extent.shape, types[key], extent.stored.name, extent.nbytes)
            for key, extent in self._extents.items()
        }
        for file in self.mapped:
            file.release(0, file.size)  # the header has been read

    def check_unquantised(self, quantize: str) -> None:
        """Raise JobError if a job's `quantize` would quantise what is quantised already."""
        check_unquantised(quantize, self.path, self._extents)

    @cached_property  # who plans asks for every place
    def loading_nbytes(self) -> int:
        """Bytes that loading takes at most, besides the pages: most matrices are packed without being decoded."""
        matrices = [(key, extent.stored) for key, extent in self._extents.items() if len(extent.shape) > 1]
        packed = all(_packed_as_stored(stored, self.tensors[key].type) for key, stored in matrices)
        return UNDER_WAY if packed else LOADING_NBYTES

    def extents(self) -> Iterator[tuple[Path, int, int]]:
        """Yield the place of all tensors in the files: file, offset and bytes."""
        for extent in self._extents.values():
            yield from ((file.path, offset, nbytes) for file, offset, nbytes in extent.lies())

    def read(self, key: Key, rows: range | None = None, cols: range | None = None, threads: int = 1) -> Bytes:
        """Return rows and columns of a matrix in its type's blocks: uint8 [len(rows), row bytes of len(cols)].

        Columns of a quantised matrix begin at a multiple of its type's block and end at one or at the last. The result
        may be a view of the mapped file (read-only): use it, then `release`.
        """
        extent, type = self._extents[key], self.tensors[key].type.multiplied_as
        rows = range(extent.n) if rows is None else rows
        cols = range(extent.k) if cols is None else cols
        assert cols.start % type.block == 0, (key, cols)
        assert cols.stop % type.block == 0 or cols.stop == extent.k, (key, cols)
        raw = extent.rows(rows)
        if extent.stored.own and type == extent.stored.type:
            cut = _blocks(extent.stored, raw, cols)
            unaligned = cut.ctypes.data % min(type.block_bytes, 4) if type.block == 1 else 0
            return cut.copy() if unaligned else np.ascontiguousarray(cut)
        values = _values(extent, raw, cols, threads)
        if type is BlockType.F32:
            return values.view(np.uint8)
        if type is BlockType.BF16:
            return values.astype(ml_dtypes.bfloat16).view(np.uint8)
        out = np.empty((len(rows), type.row_bytes(len(cols))), np.uint8)
        kernels.quantize(type, values, out, threads)
        return out

    def rows_to_pack(self, key: Key, rows: range, cols: range) -> Rows:
        """Return rows and columns of a matrix as in the file, not copied, if `kernels.pack` can take them so."""
        extent, type = self._extents[key], self.tensors[key].type
        stored, head = extent.stored, self.head_rows(key)
        if not _packed_as_stored(stored, type):
            return Rows(type, self.read(key, rows, cols), 0)
        if head and (rows.start % head or rows.stop % head):
            raw, head = extent.rows(rows), 0
        else:
            raw = extent.rows_together(rows)
        return Rows(stored.type, _blocks(stored, raw, cols), head)

    def in_place(self, entry: PageTensor) -> StoredRows | None:
        """Return the places of planned tensors that products use as stored: whole rows in order, no expert blocks."""
        extent, type = self._extents[entry.key], entry.type
        there = extent.at(entry.rows.start)
        unchanged = extent.stored.own and type == extent.stored.type
        whole = bool(entry.bounds) and len(entry.cols) == extent.k
        if there is None or not unchanged or not whole or not used_as_stored(type, entry.k, entry.bounds):
            return None
        if entry.key.expert >= 0 if type.quantised else there[1] % type.block_bytes:
            return None
        return StoredRows(self.mapped.index(there[0]), there[1], entry.n * extent.row_bytes, extent.row_bytes)

    def in_file(self, entry: PageTensor) -> bool:
        """Return whether what is planned can be used where it lies in its file for good."""
        return entry.type.block == 1 and self.in_place(entry) is not None

    def head_rows(self, key: Key) -> int:
        """Return rows of a head of a matrix whose rows lie in llama.cpp's order; 0 for all others."""
        extent = self._extents[key]
        return extent.n // extent.rope_heads if extent.rope_heads else 0

    def read_f32(self, key: Key, rows: range | NDArray[np.integer[Any]] | None = None) -> Floats:
        """Values as float32, as precise as they are stored: a vector (or some of its entries) [n], rows [m, k]."""
        extent = self._extents[key]
        if len(extent.shape) == 1:
            values = extent.stored.decode(extent.vector(), extent.k, threads=1)[0]
            index = np.arange(extent.k) if rows is None else np.asarray(rows)
            result: Floats = values[llama_cpp_rows(index, extent.k, extent.rope_heads)]
        elif rows is None or isinstance(rows, range):
            stored = extent.rows(range(extent.n) if rows is None else rows)
            result = _values(extent, stored, range(extent.k), threads=1)
        else:
            return _values(extent, extent.single_rows(rows), range(extent.k), threads=1)
        self.release(key)
        return result

    def floats(self, key: Key) -> Iterator[NDArray[Any]]:
        """Yield the values of a tensor as float32, piece by piece."""
        extent = self._extents[key]
        if len(extent.shape) == 1:
            yield self.read_f32(key)
            return
        step = max(PIECE // extent.working_row_bytes, 1)
        for first in range(0, extent.n, step):
            rows = range(first, min(first + step, extent.n))
            yield _values(extent, extent.rows(rows), range(extent.k), threads=1)
            self.release(key, rows)

    def plan(self, page: PageSpec, model: Inventory, place: Place) -> PagePlan:
        """Return the page plan of a rank."""
        known = page, place.shard, place.shards
        if known not in self._plans:
            entries, nbytes = plan_entries(page.tensors, place, lambda key: self.tensors[key].type)
            name = page_name(page.kind, page.layer, page.expert)
            self._plans[known] = PagePlan(name, entries, nbytes, page.layer, page.kind, expert=page.expert)
        return self._plans[known]

    def plan_experts(self, pages: Sequence[PageSpec], model: Inventory, place: Place) -> list[PagePlan]:
        """Return the page plan of a rank for each of a layer's experts; most are equal to the first."""
        known = pages[0], place.shard, place.shards
        if known in self._expert_plans:
            return self._expert_plans[known]
        first, keys = self.plan(pages[0], model, place), [tensor.key for tensor in pages[0].tensors]
        types = [self.tensors[key].type for key in keys]

        def planned(expert: int) -> PagePlan:
            own = [self.tensors[key._replace(expert=expert)].type for key in keys]
            if own != types:
                return self.plan(pages[expert], model, place)
            entries = tuple(replace(entry, key=entry.key._replace(expert=expert)) for entry in first.entries)
            name = page_name(first.kind, first.layer, expert)
            return replace(first, name=name, entries=entries, expert=expert)

        self._expert_plans[known] = [first, *(planned(expert) for expert in range(1, len(pages)))]
        return self._expert_plans[known]

    def open_loader(
        self, kind: Kind, threads: int, pages: Sequence[PagePlan], streamed: bool
    ) -> Loader[Page]:
        """Return the loader of some pages."""
        return open_unpacked_loader(self, kind, threads, pages, streamed)

    def stored_rows(self, key: Key, rows: range) -> tuple[Stored, Bytes]:
        """Return rows of a matrix as they are stored, and how that is: for those that are to be stored again alike."""
        extent = self._extents[key]
        return extent.stored, extent.rows(rows)

    def working_row_bytes(self, key: Key) -> int:
        """Return bytes that a row of a matrix takes while it is read, beside what is delivered."""
        return self._extents[key].working_row_bytes

    def read_past_cache(self) -> None:
        """From now on rows of matrices are read past the page cache, and nothing is kept of them there."""
        for file in self.mapped:
            file.read_past_cache()

    def repeated(self, layers: int) -> TensorSource:
        """This model with `layers` layers, each the same as the first; closing either closes both."""
        extents = {key: extent for key, extent in self._extents.items() if key.layer < 0}
        for key, extent in self._extents.items():
            if key.layer == 0:
                extents.update((key._replace(layer=layer), extent) for layer in range(layers))
        config = {**self.config, "num_hidden_layers": layers}
        made = TensorSource(self.path, self.mapped, (), extents, config, self.tokenizer)
        made.tensors = {key: self.tensors[key._replace(layer=min(key.layer, 0))] for key in extents}
        return made

    def keep_as_stored(self, keys: Collection[Key]) -> None:
        """From now on deliver these matrices with the type that they have in their files."""
        self.tensors = {
            key: replace(info, type=self._extents[key].stored.type) if key in keys else info
            for key, info in self.tensors.items()
        }
        self._plans.clear()
        self._expert_plans.clear()
        vars(self).pop("loading_nbytes", None)

    def release(self, key: Key, rows: range | None = None) -> None:
        """Give back the mapped pages of a tensor, or of some rows of it."""
        self._extents[key].release(rows)

    def close(self) -> None:
        """Unmap the files; arrays that `read` returned must not be used any more."""
        for file in self.mapped:
            file.close()


def _packed_as_stored(stored: Stored, type: BlockType) -> bool:
    """Return whether `kernels.pack` makes matrices of a type of what is stored."""
    same = stored.own and type.multiplied_as == stored.type
    return same or (stored.block == 1 and type in QUANTIZE.values())


def _blocks(stored: Stored, raw: Bytes, cols: range) -> Bytes:
    """Return the blocks of stored rows in which some columns lie; a view."""
    first, stop = cols.start // stored.block, -(-cols.stop // stored.block)
    return raw[:, first * stored.block_bytes : stop * stored.block_bytes]


def _values(extent: Extent, raw: Bytes, cols: range, threads: int) -> Floats:
    """Columns of stored rows, decoded: f32 [len(raw), len(cols)]. Only the blocks that hold them are looked at."""
    stored = extent.stored
    cut = _blocks(stored, raw, cols)
    values = stored.decode(cut, cut.shape[1] // stored.block_bytes * stored.block, threads)
    begin = cols.start % stored.block
    return np.ascontiguousarray(values[:, begin : begin + len(cols)])
