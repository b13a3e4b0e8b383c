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
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..comm.grid import Shape
from ..errors import ModelError
from ..kernels.types import BlockType
from .layer import EXPERT, HEAD, Bytes, Entry, Flags, aligned, expert_tensors, fill, head_tensors, layer_parts
from .mapped import MappedFile
from .names import Key
from .packed_layout import (
    EMBED,
    FORMAT,
    PAGE,
    VERSION,
    Panel,
    described,
    layer_file,
    panel_name,
    panels_of,
)
from .reading import REQUESTS, new_buffer
from .safetensors import read_metadata
from .tensors import TensorSource
from .verified import VerifiedFile

TEMPORARY = ".tmp"
MAKERS = (
    2  # parts that are made ready at a time: while the last rows of one are under way, the next one begins
)
WRITERS = 4  # pieces that are written and read back at a time
CHUNK = 8 * 2**20  # bytes of the embedding table, or of a file that is looked at again, held at a time
_DTYPES = (BlockType.F32, BlockType.F16, BlockType.BF16)  # of which safetensors knows the name

Progress = Callable[[int], None]  # so many more bytes are safe


@dataclass(frozen=True)
class Part:
    """What is paged in together. An expert's panels are those of the layer's first one."""

    name: str
    layer: int
    panels: tuple[Panel, ...]
    expert: int = -1

    @property
    def nbytes(self) -> int:
        return sum(panel.nbytes for panel in self.panels)


@dataclass(frozen=True)
class FilePlan:
    """A file to be: its parts, or the embedding table of so many bytes."""

    name: str
    header: dict[str, Any]
    parts: tuple[Part, ...]
    data_bytes: int

    def head(self, digest: str) -> bytes:
        """The file's beginning, as long as it will be whatever the hash of the rest."""
        metadata = self.header["__metadata__"] | {"sha256": digest}
        text = json.dumps(self.header | {"__metadata__": metadata}, separators=(",", ":")).encode()
        length = aligned(8 + len(text), PAGE) - 8
        return length.to_bytes(8, "little") + text.ljust(length)

    @property
    def nbytes(self) -> int:
        return len(self.head("0" * 64)) + self.data_bytes


def plan_files(source: TensorSource, shape: Shape, flags: Flags, about: dict[str, str]) -> list[FilePlan]:
    """All files of a model; `about` says in each where it comes from."""
    about = {"format": FORMAT, "version": str(VERSION), **about}
    plans = []
    for layer in range(shape.n_layers):
        parts = [
            Part(name, layer, tuple(panels_of(tensors, shape, lambda key: source.tensors[key].type)))
            for name, tensors in layer_parts(shape, flags, layer).items()
        ]
        if flags.moe_layers[layer]:
            parts += _experts(source, shape, layer)
        plans.append(_plan(layer_file(layer), tuple(parts), about))
    panels = panels_of(list(head_tensors(shape)), shape, lambda key: source.tensors[key].type)
    plans.append(_plan("head.safetensors", (Part(HEAD, -1, tuple(panels)),), about))
    return [*plans, _plan_embed(source, about)]


def _experts(source: TensorSource, shape: Shape, layer: int) -> Iterator[Part]:
    """A layer's experts; ModelError if they are not all of the same types."""
    first = expert_tensors(shape, layer, 0)
    panels = tuple(panels_of(first, shape, lambda key: source.tensors[key].type))
    for expert in range(shape.n_experts):
        for key, _ in first:
            if source.tensors[key._replace(expert=expert)].type != source.tensors[key].type:
                raise ModelError(
                    f"{source.path}: the experts of layer {layer} are of different types, which cannot be packed; "
                    "name one with --weights."
                )
        yield Part(EXPERT, layer, panels, expert)


def _plan(name: str, parts: tuple[Part, ...], about: dict[str, str]) -> FilePlan:
    header: dict[str, Any] = {}
    pieces: list[dict[str, Any]] = []
    offset = 0
    experts = sum(part.expert >= 0 for part in parts)
    for part in parts:
        if part.expert > 0:  # is like the first one, and lies in the same tensor
            continue
        pieces += described(list(part.panels), part.name, part.layer)
        one = part.expert == 0
        for number, dims in enumerate(
            [(experts, part.nbytes)] if one else [(p.nbytes,) for p in part.panels]
        ):
            end = offset + math.prod(dims)
            tensor = {"dtype": "U8", "shape": list(dims), "data_offsets": [offset, end]}
            header[panel_name(part.name, part.layer, number)] = tensor
            offset = end
    metadata = {**about, "pieces": json.dumps(pieces, separators=(",", ":"))}
    return FilePlan(name, {"__metadata__": metadata, **header}, parts, offset)


def _plan_embed(source: TensorSource, about: dict[str, str]) -> FilePlan:
    n, k = source.tensors[Key(EMBED)].shape
    stored, _ = source.stored_rows(Key(EMBED), range(0))
    plain = stored.own and stored.type in _DTYPES
    shape = [n, k] if plain else [n, stored.row_bytes(k)]
    size = n * stored.row_bytes(k)
    metadata = {**about, "stored": stored.name, "columns": str(k)}
    tensor = {"dtype": stored.name if plain else "U8", "shape": shape, "data_offsets": [0, size]}
    return FilePlan(f"{EMBED}.safetensors", {"__metadata__": metadata, EMBED: tensor}, (), size)


class Writer:
    """Writes files one after the other. While parts are made ready, those before go to the disk and are hashed."""

    def __init__(self, source: TensorSource, directory: Path, threads: int, progress: Progress) -> None:
        """The source is read past the page cache from now on."""
        source.read_past_cache()
        self._source = source
        self._directory = directory
        self._progress = progress
        # Parts that are made and one on its way to the disk are about a layer.
        self._makers = ThreadPoolExecutor(MAKERS, "packing")
        self._rows = ThreadPoolExecutor(threads + REQUESTS, "rows")  # some wait for the disk
        self._disk = ThreadPoolExecutor(WRITERS, "write")
        self._hash, self._ends = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "end")
        self._last: list[Future[None]] = []  # what becomes of the piece before
        self._spare: list[Bytes] = []  # a buffer that has been written, for new memory takes long
        self._files: list[Future[None]] = []
        self.digests: dict[str, str] = {}

    def keep(self, plan: FilePlan) -> bool:
        """Whether a file is there already, from an earlier run, and is sound."""
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

    def write(self, plan: FilePlan) -> None:
        """Write a file; it is complete when `close` returns."""
        file = VerifiedFile(self._directory / (plan.name + TEMPORARY), plan.nbytes)
        digest = hashlib.sha256()
        at = begin = len(plan.head("0" * 64))
        try:
            before: Bytes | None = None
            for data in self._in_order(self._pieces(plan)):
                self._wait()
                if before is not None and not self._spare:
                    self._spare.append(before)
                self._last = [self._hash.submit(digest.update, data.data), *file.put(data, at, self._disk)]
                at += data.nbytes
                self._progress(data.nbytes)
                before = data
                del data
            self._wait()
        except BaseException:
            wait(self._last)
            file.close()
            raise
        assert at - begin == plan.data_bytes, plan.name
        self._progress(begin)
        self._files.append(self._ends.submit(self._finish, plan, file, digest.hexdigest()))

    def close(self) -> None:
        """Wait for all files; what went wrong with one is raised."""
        for pool in (self._makers, self._rows, self._hash, self._ends, self._disk):
            pool.shutdown()
        for file in self._files:
            file.result()

    def _finish(self, plan: FilePlan, file: VerifiedFile, digest: str) -> None:
        """Bring a file to the disk, and give it its name."""
        head = np.frombuffer(plan.head(digest), np.uint8)
        try:
            for done in file.put(head, 0, self._disk):
                done.result()
            file.finish()
        finally:
            file.close()
        os.replace(file.path, self._directory / plan.name)
        self.digests[plan.name] = digest

    def _wait(self) -> None:
        last, self._last = self._last, []
        wait(last)
        for done in last:
            done.result()

    def _in_order(self, pieces: Iterator[Callable[[], Bytes]]) -> Iterator[Bytes]:
        """What the functions return, some of them called at a time."""
        waiting: deque[Future[Bytes]] = deque()
        for make in pieces:
            waiting.append(self._makers.submit(make))
            if len(waiting) >= MAKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _pieces(self, plan: FilePlan) -> Iterator[Callable[[], Bytes]]:
        """What makes the file's data, piece by piece."""
        for part in plan.parts:
            yield partial(self._part, part)
        if not plan.parts:
            n = self._source.tensors[Key(EMBED)].shape[0]
            row = plan.data_bytes // n
            even = PAGE // math.gcd(row, PAGE)  # rows whose bytes are whole pages
            step = max(CHUNK // (row * even), 1) * even
            for first in range(0, n, step):
                yield partial(self._embed, range(first, min(first + step, n)))

    def _part(self, part: Part) -> Bytes:
        data = self._room(part.nbytes)
        end = begin = 0
        for panel in part.panels:  # what lies between the pieces is zeros
            for piece in panel.pieces:
                data[end : begin + piece.entry.offset] = 0
                end = begin + piece.entry.offset + piece.entry.nbytes
            begin += panel.nbytes
        data[end:] = 0
        fill(_alike(part, data), self._source, self._rows)
        return data

    def _room(self, nbytes: int) -> Bytes:
        with contextlib.suppress(IndexError):
            spare = self._spare.pop()
            if spare.nbytes == nbytes:
                return spare
        return new_buffer(nbytes, PAGE)

    def _embed(self, rows: range) -> Bytes:
        stored = self._source.stored_rows(Key(EMBED), rows)[1]
        data = new_buffer(stored.nbytes, PAGE)
        data.reshape(stored.shape)[:] = stored
        self._source.release(Key(EMBED), rows)
        return data


def _alike(part: Part, data: Bytes) -> Iterator[list[tuple[Entry, Bytes]]]:
    """The pieces of a part with where they go, those together that take the same rows of a tensor."""
    groups: dict[tuple[Key, range], list[tuple[Entry, Bytes]]] = {}
    begin = 0
    for panel in part.panels:
        for piece in panel.pieces:
            entry = piece.entry
            if part.expert >= 0:
                entry = replace(entry, key=entry.key._replace(expert=part.expert))
            out = data[begin + entry.offset : begin + entry.offset + entry.nbytes]
            groups.setdefault((entry.key, entry.rows), []).append((entry, out))
        begin += panel.nbytes
    yield from groups.values()


def _digest_in(path: Path) -> str:
    file = MappedFile(path)
    with contextlib.closing(file):
        _, metadata = read_metadata(file)
    return metadata.get("sha256", "")


def _hash_of(path: Path, begin: int) -> str:
    """The hash of what lies behind a file's header."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
