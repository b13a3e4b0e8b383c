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
    described,
    layer_file,
    panel_name,
    panels_of,
)
from mpillm.weights.plan import Entry, aligned

TEMPORARY = ".tmp"
MAKERS = (
    2  # parts that are made ready at a time: while the last rows of one are under way, the next one begins
)
LEAVING = 2  # parts on their way to the disk: one of them may still be hashed
WRITERS = 4  # pieces that are written and read back at a time
CHUNK = 8 * 2**20  # bytes of a file that is looked at again, held at a time
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


def plan_files(source: TensorSource, model: Inventory, about: dict[str, str]) -> list[FilePlan]:
    """All files of a model; `about` says in each where it comes from."""

    def part(page: PageSpec) -> Part:
        panels = panels_of(page.tensors, model.max_shards, lambda key: source.tensors[key].type)
        return Part(page.name, page.layer, tuple(panels))

    about = {"format": FORMAT, "version": str(VERSION), **about}
    plans = []
    for layer in range(model.n_layers):
        parts = [part(page) for page in model.pages(layer)]
        if experts := model.experts(layer):
            parts += _experts(source, experts, part(experts[0]))
        plans.append(_plan(layer_file(layer), tuple(parts), about))
    plans.append(_plan("head.safetensors", (part(model.head),), about))
    return [*plans, _plan_embed(source, about)]


def _experts(source: TensorSource, experts: Sequence[PageSpec], first: Part) -> Iterator[Part]:
    """A layer's experts, all like the first one; ModelError if they are not of the same types."""
    for page in experts:
        for tensor, like in zip(page.tensors, experts[0].tensors, strict=True):
            if source.tensors[tensor.key].type != source.tensors[like.key].type:
                raise ModelError(
                    f"{source.path}: the experts of layer {page.layer} are of different types, which cannot be packed; "
                    "name one with --weights."
                )
        yield replace(first, expert=page.expert)


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


class Made:
    """A piece of a file that is ready for the disk, in memory that may be longer."""

    def __init__(self, memory: Bytes, nbytes: int) -> None:
        self.memory, self.data = memory, memory[:nbytes]


class Writer:
    """Writes files one after the other. While parts are made ready, those before go to the disk and are hashed."""

    def __init__(self, source: TensorSource, directory: Path, threads: int, progress: Progress) -> None:
        """The source is read past the page cache from now on."""
        source.read_past_cache()
        self._source = source
        self._directory = directory
        self._progress = progress
        # Parts that are made and those on their way to the disk are about a layer.
        self._makers = ThreadPoolExecutor(MAKERS, "packing")
        self._rows = ThreadPoolExecutor(threads + REQUESTS, "rows")  # some wait for the disk
        self._disk = ThreadPoolExecutor(WRITERS, "write")
        self._hash, self._ends = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "end")
        self._leaving: deque[tuple[Made, list[Future[None]]]] = deque()  # on their way to the disk
        self._lock = threading.Lock()
        self._spare: list[Bytes] = []  # memory that has been written from: new memory takes long
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

    def write(self, plans: Iterable[FilePlan]) -> None:
        """Write files one behind the other; they are complete when `close` returns.

        The parts of one are made while the last ones of the file before go to the disk.
        """
        file: _Growing | None = None
        try:
            for plan, made in self._in_order(self._pieces(plans)):
                self._wait(LEAVING - 1)
                file = file or _Growing(plan, self._directory)
                last = file.put(made.data, self._hash, self._disk)
                self._leaving.append((made, last))
                self._progress(made.data.nbytes)
                if file.whole:
                    self._progress(file.begin)
                    self._files.append(self._ends.submit(self._finish, file))
                    file = None
            self._wait(0)
        except BaseException:
            wait([done for _, last in self._leaving for done in last])
            if file is not None:
                file.close()
            raise

    def close(self) -> None:
        """Wait for all files; what went wrong with one is raised."""
        for pool in (self._makers, self._rows, self._hash, self._ends, self._disk):
            pool.shutdown()
        for file in self._files:
            file.result()

    def _finish(self, file: _Growing) -> None:
        """Bring a file to the disk, and give it its name."""
        try:
            path, digest = file.finish()
        finally:
            file.close()
        os.replace(path, self._directory / file.plan.name)
        self.digests[file.plan.name] = digest

    def _wait(self, most: int) -> None:
        """Until at most so many pieces are on their way to the disk: the others' memory serves again."""
        while len(self._leaving) > most:
            made, last = self._leaving[0]
            wait(last)
            for done in last:
                done.result()
            self._leaving.popleft()
            with self._lock:
                self._spare.append(made.memory)

    def _in_order(
        self, pieces: Iterator[tuple[FilePlan, Callable[[], Made]]]
    ) -> Iterator[tuple[FilePlan, Made]]:
        """What the functions return, some of them called at a time."""
        waiting: deque[tuple[FilePlan, Future[Made]]] = deque()
        for plan, make in pieces:
            waiting.append((plan, self._makers.submit(make)))
            if len(waiting) >= MAKERS:
                plan, made = waiting.popleft()
                yield plan, made.result()
        while waiting:
            plan, made = waiting.popleft()
            yield plan, made.result()

    def _pieces(self, plans: Iterable[FilePlan]) -> Iterator[tuple[FilePlan, Callable[[], Made]]]:
        """What makes the files' data, piece by piece."""
        for plan in plans:
            for part in plan.parts:
                yield plan, partial(self._part, part)
            if not plan.parts:
                n = self._source.tensors[Key(EMBED)].shape[0]
                row = plan.data_bytes // n
                even = PAGE // math.gcd(row, PAGE)  # rows whose bytes are whole pages
                step = max(PORTION // (row * even), 1) * even
                for first in range(0, n, step):
                    yield plan, partial(self._embed, range(first, min(first + step, n)))

    def _part(self, part: Part) -> Made:
        made = self._room(part.nbytes)
        end = begin = 0
        for panel in part.panels:  # what lies between the pieces is zeros
            for piece in panel.pieces:
                made.data[end : begin + piece.entry.offset] = 0
                end = begin + piece.entry.offset + piece.entry.nbytes
            begin += panel.nbytes
        made.data[end:] = 0
        fill(_alike(part, made.data), self._source, self._rows, PORTION)
        return made

    def _embed(self, rows: range) -> Made:
        stored = self._source.stored_rows(Key(EMBED), rows)[1]
        made = self._room(stored.nbytes)
        made.data.reshape(stored.shape)[:] = stored
        self._source.release(Key(EMBED), rows)
        return made

    def _room(self, nbytes: int) -> Made:
        """The smallest memory that is long enough, of what has been written; else new, and some of that goes."""
        with self._lock:
            self._spare.sort(key=len)
            for number, memory in enumerate(self._spare):
                if memory.nbytes >= nbytes:
                    return Made(self._spare.pop(number), nbytes)
            if self._spare:
                self._spare.pop()
        return Made(new_buffer(nbytes, PAGE), nbytes)


class _Growing:
    """A file on its way to the disk."""

    def __init__(self, plan: FilePlan, directory: Path) -> None:
        self.plan = plan
        self.begin = self._at = len(plan.head("0" * 64))
        self._file = VerifiedFile(directory / (plan.name + TEMPORARY), plan.nbytes)
        self._digest = hashlib.sha256()
        self._put: list[Future[None]] = []

    @property
    def whole(self) -> bool:
        """Whether there is nothing more to put."""
        return self._at == self.plan.nbytes

    def put(self, data: Bytes, hash: Executor, disk: Executor) -> list[Future[None]]:
        """Write and hash what comes next; it must stay as it is meanwhile."""
        assert self._at + data.nbytes <= self.plan.nbytes, self.plan.name
        at, self._at = self._at, self._at + data.nbytes
        put = [hash.submit(self._digest.update, data.data), *self._file.put(data, at, disk)]
        self._put += put
        return put

    def finish(self) -> tuple[Path, str]:
        """Write the file's head, and have the disk keep it all: its name, and the hash of its data."""
        wait(self._put)  # all of them, even if one fails: the file is closed then
        for done in self._put:
            done.result()
        digest = self._digest.hexdigest()
        self._file.write(np.frombuffer(self.plan.head(digest), np.uint8), 0)
        self._file.finish()
        return self._file.path, digest

    def close(self) -> None:
        self._file.close()


def _alike(part: Part, data: Bytes) -> Iterator[list[tuple[Entry, Bytes]]]:
    """The pieces of a part with where they go, those together that take the same rows; tensor after tensor."""
    groups: dict[Key, dict[range, list[tuple[Entry, Bytes]]]] = {}
    begin = 0
    for panel in part.panels:
        for piece in panel.pieces:
            entry = piece.entry
            if part.expert >= 0:
                entry = replace(entry, key=entry.key._replace(expert=part.expert))
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
    """The hash of what lies behind a file's header."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
