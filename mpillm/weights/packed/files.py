"""Writes the files of a packed model: one for each layer, one for the output head, one for the embedding table.

A file is written under another name, each piece of it is read back from the disk and compared, and then it is renamed:
under its own name it is complete, and its header says by which hash to know that. docs/packed.md describes what is in
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import ModelError
from mpillm.kernels.types import BlockType
from mpillm.weights.fill import fill
from mpillm.weights.formats.safetensors import read_metadata
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.inventory import Inventory, PageSpec
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.io.reading import PORTION, REQUESTS, Bytes, new_buffer
from mpillm.weights.io.verified import VerifiedFile
from mpillm.weights.names import Key
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
from mpillm.weights.plan import PageTensor, aligned

TEMPORARY = ".tmp"
MAKERS = 2  # pages that are packed at a time: the next one begins while the last rows of one are packed
WRITING = 2  # pages that are written at a time: one of them may still be hashed
WRITERS = 4  # pieces that are written and read back at a time
CHUNK = 8 * 2**20  # bytes that are read at a time to hash a file
_DTYPES = (BlockType.F32, BlockType.F16, BlockType.BF16)  # of which safetensors knows the name

Progress = Callable[[int], None]  # of the number of further bytes that are on the disk


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
        """The file's header; its length does not depend on the hash `digest` of the data."""
        metadata = self.header["__metadata__"] | {"sha256": digest}
        text = json.dumps(self.header | {"__metadata__": metadata}, separators=(",", ":")).encode()
        length = aligned(8 + len(text), PAGE) - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    @property
    def nbytes(self) -> int:
        return len(self.head("0" * 64)) + self.data_bytes


def plan_files(source: TensorSource, model: Inventory, about: dict[str, str]) -> list[FilePlan]:
    """All files of a model; each has the metadata `about`, which names its source."""

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
    """A layer's experts, all like the first one; ModelError if they are not of the same types."""
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


class PackedPiece:
    """A piece of a file that is ready to be written, in memory that may be longer."""

    def __init__(self, memory: Bytes, nbytes: int) -> None:
        self.memory, self.data = memory, memory[:nbytes]


class Writer:
    """Writes files one after the other. While pages are packed, the ones before are written and hashed."""

    def __init__(self, source: TensorSource, directory: Path, threads: int, progress: Progress) -> None:
        """From now on the source is read past the page cache."""
        source.read_past_cache()
        self._source = source
        self._directory = directory
        self._progress = progress
        # The pages that are packed and written at a time amount to about a layer.
        self._makers = ThreadPoolExecutor(MAKERS, "packing")
        self._rows = ThreadPoolExecutor(threads + REQUESTS, "rows")  # some wait for the disk
        self._disk = ThreadPoolExecutor(WRITERS, "write")
        self._hash, self._ends = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "end")
        self._writing: deque[tuple[PackedPiece, list[Future[None]]]] = deque()
        self._lock = threading.Lock()
        self._spare: list[Bytes] = []  # memory for reuse, because allocating takes long
        self._files: list[Future[None]] = []
        self.digests: dict[str, str] = {}

    def keep(self, plan: FilePlan) -> bool:
        """Whether a sound file is there from an earlier run."""
        path = self._directory / plan.name
        if not os.path.exists(path) or path.stat().st_size != plan.nbytes:
            return False
        try:
            digest = _digest_in(path)
        except ModelError:
            return False
        head = plan.head(digest)
        with path.open("rb") as file:
            if file.read(len(head)) != head:
                return False
        if _hash_of(path, len(head)) != digest:
            return False
        self.digests[plan.name] = digest
        self._progress(plan.nbytes)
        return True

    def write(self, plans: Iterable[FilePlan]) -> None:
        """Write files one after the other; they are complete when `close` returns.

        The first pages of a file are packed while the last ones of the file before are written.
        """
        file: _GrowingFile | None = None
        try:
            for plan, made in self._in_order(self._pieces(plans)):
                self._wait(WRITING - 1)
                file = file or _GrowingFile(plan, self._directory)
                last = file.put(made.data, self._hash, self._disk)
                self._writing.append((made, last))
                self._progress(made.data.nbytes)
                if file.whole:
                    self._progress(file.begin)
                    self._files.append(self._ends.submit(self._finish, file))
                    file = None
            self._wait(0)
        except BaseException:
            wait([done for _, last in self._writing for done in last])
            if file is not None:
                file.close()
            raise

    def close(self) -> None:
        """Wait for all files, and raise the first error."""
        for pool in (self._makers, self._rows, self._hash, self._ends, self._disk):
            pool.shutdown()
        for file in self._files:
            file.result()

    def _finish(self, file: _GrowingFile) -> None:
        """Complete a file, and rename it."""
        try:
            path, digest = file.finish()
        finally:
            file.close()
        os.replace(path, self._directory / file.plan.name)
        self.digests[file.plan.name] = digest

    def _wait(self, maximum: int) -> None:
        """Wait until at most `maximum` pieces are being written, and reuse the memory of the others."""
        while len(self._writing) > maximum:
            made, last = self._writing[0]
            wait(last)
            for done in last:
                done.result()
            self._writing.popleft()
            with self._lock:
                self._spare.append(made.memory)

    def _in_order(
        self, pieces: Iterator[tuple[FilePlan, Callable[[], PackedPiece]]]
    ) -> Iterator[tuple[FilePlan, PackedPiece]]:
        """The results of the functions in order, MAKERS of which run at a time."""
        waiting: deque[tuple[FilePlan, Future[PackedPiece]]] = deque()
        for plan, make in pieces:
            waiting.append((plan, self._makers.submit(make)))
            if len(waiting) >= MAKERS:
                plan, made = waiting.popleft()
                yield plan, made.result()
        while waiting:
            plan, made = waiting.popleft()
            yield plan, made.result()

    def _pieces(self, plans: Iterable[FilePlan]) -> Iterator[tuple[FilePlan, Callable[[], PackedPiece]]]:
        """For each piece of the files' data, its file and the function that makes it."""
        for plan in plans:
            for page in plan.pages:
                yield plan, partial(self._page, page)
            if not plan.pages:
                n = self._source.tensors[Key(EMBED)].shape[0]
                row = plan.data_bytes // n
                even = PAGE // math.gcd(row, PAGE)  # rows whose bytes are whole pages
                step = max(PORTION // (row * even), 1) * even
                for first in range(0, n, step):
                    yield plan, partial(self._embed, range(first, min(first + step, n)))

    def _page(self, page: PackedPage) -> PackedPiece:
        made = self._allocate(page.nbytes)
        end = begin = 0
        for panel in page.panels:  # the gaps between the pieces are zeros
            for piece in panel.pieces:
                made.data[end : begin + piece.entry.offset] = 0
                end = begin + piece.entry.offset + piece.entry.nbytes
            begin += panel.nbytes
        made.data[end:] = 0
        fill(_grouped(page, made.data), self._source, self._rows, PORTION)
        return made

    def _embed(self, rows: range) -> PackedPiece:
        stored = self._source.stored_rows(Key(EMBED), rows)[1]
        made = self._allocate(stored.nbytes)
        made.data.reshape(stored.shape)[:] = stored
        self._source.release(Key(EMBED), rows)
        return made

    def _allocate(self, nbytes: int) -> PackedPiece:
        """The smallest spare memory that is long enough, else new memory; then a spare one is freed for it."""
        with self._lock:
            self._spare.sort(key=len)
            for number, memory in enumerate(self._spare):
                if memory.nbytes >= nbytes:
                    return PackedPiece(self._spare.pop(number), nbytes)
            if self._spare:
                self._spare.pop()
        return PackedPiece(new_buffer(nbytes, PAGE), nbytes)


class _GrowingFile:
    """A file that is being written."""

    def __init__(self, plan: FilePlan, directory: Path) -> None:
        self.plan = plan
        self.begin = self._at = len(plan.head("0" * 64))
        self._file = VerifiedFile(directory / (plan.name + TEMPORARY), plan.nbytes)
        self._digest = hashlib.sha256()
        self._put: list[Future[None]] = []

    @property
    def whole(self) -> bool:
        """Whether all data has been put."""
        return self._at == self.plan.nbytes

    def put(self, data: Bytes, hash: Executor, disk: Executor) -> list[Future[None]]:
        """Write and hash the next piece, which must not change until the futures are done."""
        assert self._at + data.nbytes <= self.plan.nbytes, self.plan.name
        at, self._at = self._at, self._at + data.nbytes
        put = [hash.submit(self._digest.update, data.data), *self._file.put(data, at, disk)]
        self._put += put
        return put

    def finish(self) -> tuple[Path, str]:
        """Write the file's header and flush all to the disk; return the file's path and the hash of its data."""
        wait(self._put)  # all of them, even if one fails: the file is closed then
        for done in self._put:
            done.result()
        digest = self._digest.hexdigest()
        self._file.write(np.frombuffer(self.plan.head(digest), np.uint8), 0)
        self._file.finish()
        return self._file.path, digest

    def close(self) -> None:
        self._file.close()


def _grouped(page: PackedPage, data: Bytes) -> Iterator[list[tuple[PageTensor, Bytes]]]:
    """The pieces of a page and their destinations in `data`, tensor by tensor, grouped by their rows."""
    groups: dict[Key, dict[range, list[tuple[PageTensor, Bytes]]]] = {}
    begin = 0
    for panel in page.panels:
        for piece in panel.pieces:
            entry = piece.entry
            if page.expert >= 0:
                entry = replace(entry, key=entry.key._replace(expert=page.expert))
            out = data[begin + entry.offset : begin + entry.offset + entry.nbytes]
            groups.setdefault(entry.key, {}).setdefault(entry.rows, []).append((entry, out))
        begin += panel.nbytes
    for of_tensor in groups.values():
        yield from of_tensor.values()


def _digest_in(path: Path) -> str:
    file = MappedFile(path)
    with contextlib.closing(file):
        _, metadata = read_metadata(file)
    return metadata.get("sha256", "")


def _hash_of(path: Path, begin: int) -> str:
    """The hash of a file's data, which begins at `begin`."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
