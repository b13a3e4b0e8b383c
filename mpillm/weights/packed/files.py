"""Writes the files of a packed model, which `file_plan` lists.

A file is written under another name, each piece of it is read back from the disk and compared, and then it is renamed:
under its own name it is complete, and its header says by which hash to know that. docs/packed.md describes what is in
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mpillm.errors import ModelError
from mpillm.kernels.types import Misfit
from mpillm.weights.fill import fill
from mpillm.weights.formats.safetensors import read_metadata
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.io.reading import PORTION, REQUESTS, Bytes, new_buffer
from mpillm.weights.io.verified import VerifiedFile
from mpillm.weights.packed.file_plan import FilePlan, PackedPage
from mpillm.weights.packed.layout import EMBED, PAGE
from mpillm.weights.plan import PageTensor
from mpillm.weights.roles import Key

TEMPORARY = ".tmp"
MAKERS = 2  # pages that are packed at a time: the next one begins while the last rows of one are packed
WRITING = 2  # pages that are written at a time: one of them may still be hashed
WRITERS = 4  # pieces that are written and read back at a time
CHUNK = 8 * 2**20  # bytes that are read at a time to hash a file

WriteProgress = Callable[[int], None]  # is called with the number of further bytes that are on the disk


class Unfit(Exception):
    """A file has a matrix that cannot be stored as planned: neither it nor a later one was written under its name."""

    def __init__(self, plan: FilePlan) -> None:
        super().__init__(plan.name)
        self.plan = plan


class PackedPiece:
    """A piece of a file that is ready to be written, in memory that may be longer."""

    def __init__(self, memory: Bytes, nbytes: int) -> None:
        self.memory, self.data = memory, memory[:nbytes]


class Writer:
    """Writes files one after the other. While pages are packed, the ones before are written and hashed."""

    def __init__(self, source: TensorSource, directory: Path, threads: int, progress: WriteProgress) -> None:
        """Open the files to write; from now on the source is read past the page cache."""
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
        """Return whether a sound file is there from an earlier run."""
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

        The first pages of a file are packed while the last ones of the file before are written. After an `Unfit` it
        may be called again with other plans.
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
            self._writing.clear()
            if file is not None:
                self._progress(file.begin - file.at)
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
        """Yield the results of the functions in order, MAKERS of which run at a time."""
        waiting: deque[tuple[FilePlan, Future[PackedPiece]]] = deque()
        for plan, make in pieces:
            waiting.append((plan, self._makers.submit(make)))
            if len(waiting) >= MAKERS:
                plan, made = waiting.popleft()
                yield plan, _fitting(plan, made)
        while waiting:
            yield waiting[0][0], _fitting(*waiting.popleft())

    def _pieces(self, plans: Iterable[FilePlan]) -> Iterator[tuple[FilePlan, Callable[[], PackedPiece]]]:
        """Yield the file of each piece of the files' data, and the function that makes the piece."""
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
        fill(grouped(page, made.data), self._source, self._rows, PORTION)
        return made

    def _embed(self, rows: range) -> PackedPiece:
        stored = self._source.stored_rows(Key(EMBED), rows)[1]
        made = self._allocate(stored.nbytes)
        made.data.reshape(stored.shape)[:] = stored
        self._source.release(Key(EMBED), rows)
        return made

    def _allocate(self, nbytes: int) -> PackedPiece:
        """Return the smallest spare memory that is long enough, else new memory; then a spare one is freed for it."""
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
        self.begin = self.at = len(plan.head("0" * 64))
        self._file = VerifiedFile(directory / (plan.name + TEMPORARY), plan.nbytes)
        self._digest = hashlib.sha256()
        self._put: list[Future[None]] = []

    @property
    def whole(self) -> bool:
        """Whether all data has been put."""
        return self.at == self.plan.nbytes

    def put(self, data: Bytes, hash: Executor, disk: Executor) -> list[Future[None]]:
        """Write and hash the next piece, which must not change until the futures are done."""
        assert self.at + data.nbytes <= self.plan.nbytes, self.plan.name
        at, self.at = self.at, self.at + data.nbytes
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


def grouped(page: PackedPage, data: Bytes) -> Iterator[list[tuple[PageTensor, Bytes]]]:
    """Yield the pieces of a page and their destinations in `data`, tensor by tensor, grouped by their rows."""
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


def _fitting(plan: FilePlan, made: Future[PackedPiece]) -> PackedPiece:
    try:
        return made.result()
    except Misfit as error:
        raise Unfit(plan) from error


def _digest_in(path: Path) -> str:
    file = MappedFile(path)
    with contextlib.closing(file):
        _, metadata = read_metadata(file)
    return metadata.get("sha256", "")


def _hash_of(path: Path, begin: int) -> str:
    """Return the hash of a file's data, which begins at `begin`."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
