"""Layers of the KV cache that lie in a file and pass through memory once a step, like the weights that are streamed.

A step needs a layer's keys and values only while it is at that layer. So where the blocks of all sequences do not fit
into memory for all layers, some layers stay, and the others take turns in two buffers of one layer's size: while one is
computed on, the next one is read into the other, where the one before has just been written back. Block numbers, block
tables and the bits of every value stay as they are. In the file each layer's keys, and its values, lie one block after
the other, so what a step needs of them is a few long pieces; written back are the blocks that the step has changed.

When it pays. Let a step stream W bytes of weights, and memory hold K bytes of KV cache, which is n sequences. The disk
then reads W / n bytes for each token. With x more sequences, and X bytes of KV cache read for each step, it is
(W + X) / (n + x) bytes, where X / x is never less than K / n, what a sequence takes. So it pays if K < W, the more the
larger X; at X = W a token costs (1 + W / K) / 2 times less, and no X makes that more than twice as much. Therefore as
many blocks are offered as keep X <= W, and none if nothing is streamed. (All this where the disk is the limit: where
computing is, neither costs anything.)

L layers, b blocks in use, and memory for C blocks of one layer: all stay if L b <= C, else C / b - 2 of them, rounded
down, beside two buffers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import Interrupted, JobError
from mpillm.weights.io.filesystem import in_memory

Pools = tuple[NDArray[Any], ...]  # a layer's arrays, each [block, ...]
Run = tuple[int, int]  # neighbouring blocks: the first one, and the one behind the last
Move = Callable[[int, NDArray[np.uint8]], None]

BUFFERS = 2
REQUESTS = 4  # under way at a time
REQUEST_BYTES = 4 * 2**20
GAP_BYTES = 128 * 1024  # read along where it lies between what is needed: a request of its own takes as long
PAGE = 4096  # what direct transfers are aligned to
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly however many one takes


def layers_that_stay(n_layers: int, room: int, blocks: int) -> int:
    """How many layers stay in memory with `room` for so many blocks of one layer when `blocks` are in use."""
    return n_layers if n_layers * blocks <= room else max(room // blocks - BUFFERS, 0)


def layers_in_file(n_layers: int, room: int, blocks: int) -> int:
    """How many lie in the file, and are read for each step."""
    return n_layers - layers_that_stay(n_layers, room, blocks)


def most_blocks(n_layers: int, room: int, traffic: int) -> int:
    """The most blocks that can be used if at most `traffic` blocks of one layer are read for each step."""
    least, most = room // n_layers, max(room // BUFFERS, room // n_layers)
    while least < most:
        blocks = (least + most + 1) // 2
        if layers_in_file(n_layers, room, blocks) * blocks <= traffic:
            least = blocks
        else:
            most = blocks - 1
    return least


@dataclass
class Counters:
    """What went to the file and came from it, in bytes, and what was waited for."""

    written: int = 0
    read: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0


class SpillFile:
    """A file without a name, which goes with the process. Its space is taken at once: a full disk is known early."""

    def __init__(self, folder: Path, nbytes: int, direct: bool) -> None:
        """JobError if it cannot be had. `direct`: all transfers will be of whole pages, past the page cache."""
        if in_memory(folder):
            raise JobError(
                f"memory.spill_dir = {folder} lies in memory itself; name a directory on a local disk of each node."
            )
        self.folder = folder
        try:
            self._file, name = tempfile.mkstemp(prefix="mpillm-kv-", dir=folder)
            try:
                if direct:
                    self._file = _reopened_direct(self._file, name)
            finally:
                os.unlink(name)
        except OSError as error:
            raise JobError(
                f"memory.spill_dir = {folder}: no file can be made there ({error.strerror}); name a directory on a "
                "local disk of each node."
            ) from None
        try:
            os.posix_fallocate(self._file, 0, nbytes)
        except OSError as error:
            os.close(self._file)
            free = shutil.disk_usage(folder).free
            raise JobError(
                f"memory.kv_spill: {nbytes} bytes cannot be had in {folder} ({error.strerror}; {free} bytes are free); "
                "ask for less, or name another memory.spill_dir."
            ) from None

    def read(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Fill `out`; Interrupted if that fails."""
        try:
            count = os.preadv(self._file, [out.data], offset)
        except OSError as error:
            raise self._failed("read", error.strerror) from None
        if count != out.nbytes:
            raise self._failed("read", f"it ended after {offset + count} bytes")

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write all of `data`; Interrupted if that fails."""
        try:
            count = os.pwritev(self._file, [data.data], offset)
        except OSError as error:
            raise self._failed("written", error.strerror) from None
        if count != data.nbytes:
            raise self._failed("written", "the disk is full")

    def close(self) -> None:
        os.close(self._file)

    def _failed(self, verb: str, why: str | None) -> Interrupted:
        return Interrupted(
            f"The KV cache in {self.folder} could not be {verb} ({why}); finished requests are safe, so run the same "
            "command again, with another memory.spill_dir if that disk is broken."
        )


def _reopened_direct(file: int, name: str) -> int:
    """A descriptor that passes the page cache by; the same one where the file system has none such."""
    try:
        direct = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return file
    os.close(file)
    return direct


class Spill:
    """A rank's layers in a file. Layers, blocks and buffers are numbers; transfers happen in the order of the calls."""

    def __init__(
        self, folder: Path, make: Callable[[], Pools], n_layers: int, room: int, n_blocks: int
    ) -> None:
        """JobError if there is no file to be had; `make` makes a layer's pools of `n_blocks` each, page-aligned."""
        self.counters = Counters()
        self._n_layers, self._room = n_layers, room
        self._make = make
        self._blocks = [pool.nbytes // n_blocks for pool in make()]  # bytes of one, by pool
        self._layer_bytes = sum(self._blocks) * n_blocks
        self._starts = [sum(self._blocks[:i]) * n_blocks for i in range(len(self._blocks))]
        # In the order in which they go: spread evenly, so that there is about as much to compute between any two turns.
        self._staying = deque(sorted(range(n_layers), key=lambda layer: (layer + 1) * _GOLDEN % 1.0))
        self._slots: dict[int, int] = {}  # by layer: its place in the file
        self._buffers: list[Pools] = []
        self._turns: list[int] = []  # this step's layers of the file, in order
        self._turn = 0
        self._reads: dict[int, Future[None]] = {}
        self._reading: list[Run] = []
        self._writing: list[Run] = []
        self._top = 0  # blocks that have been in use
        self._error: BaseException | None = None
        nbytes = layers_in_file(n_layers, room, n_blocks) * self._layer_bytes
        self._file = SpillFile(folder, nbytes, all(size % PAGE == 0 for size in self._blocks))
        self._queue = ThreadPoolExecutor(1, "kv-order")
        self._workers = ThreadPoolExecutor(REQUESTS, "kv-move")

    @property
    def layers(self) -> int:
        """How many layers are in the file."""
        return len(self._slots)

    @property
    def held(self) -> int:
        """Bytes of memory that its buffers and the layers that stay take."""
        in_memory = len(self._staying) + (BUFFERS if self._slots else 0)
        return in_memory * self._top * sum(self._blocks)

    def make_room(self, top: int, pools: list[Pools | None]) -> None:
        """Write those layers of `pools` that must go before the first `top` blocks are used; None stays there."""
        before, self._top = self._top, max(self._top, top)
        stay = layers_that_stay(self._n_layers, self._room, self._top)
        while len(self._staying) > stay:
            layer = self._staying.popleft()
            leaving, pools[layer] = pools[layer], None
            self._slots[layer] = len(self._slots)
            assert leaving is not None
            if before:
                self._do(self._file.write, layer, leaving, [(0, before)]).result()

    def begin(self, needed: NDArray[np.int32], changed: NDArray[np.int32]) -> None:
        """A step begins that looks at the blocks `needed` and writes into those `changed` (both ascending)."""
        if not self._buffers:
            self._buffers = [self._make() for _ in range(BUFFERS)]
        self._turns, self._turn = sorted(self._slots), 0
        self._reading = runs(needed, GAP_BYTES // max(self._blocks))
        self._writing = runs(changed, 0)
        for turn in range(min(BUFFERS, len(self._turns))):
            self._read(turn)

    def take(self, layer: int) -> Pools:
        """The pools of the layer whose turn it is, when they have been read."""
        assert layer == self._turns[self._turn], (layer, self._turns, self._turn)
        arrived = self._reads.pop(layer)
        if not arrived.done():
            begun = time.perf_counter()
            wait([arrived])
            self.counters.stalls += 1
            self.counters.stall_seconds += time.perf_counter() - begun
        arrived.result()
        return self._buffers[self._turn % BUFFERS]

    def give(self, layer: int) -> None:
        """The layer that was taken last has been computed on: write what changed, and read what has its buffer next."""
        pools = self._buffers[self._turn % BUFFERS]
        self._do(self._file.write, layer, pools, self._writing)
        self._turn += 1
        if self._turn + BUFFERS - 1 < len(self._turns):
            self._read(self._turn + BUFFERS - 1)

    def close(self) -> None:
        """Stop the threads and give the file's space back."""
        self._queue.shutdown()
        self._workers.shutdown()
        self._file.close()

    def _read(self, turn: int) -> None:
        layer = self._turns[turn]
        self._reads[layer] = self._do(self._file.read, layer, self._buffers[turn % BUFFERS], self._reading)

    def _do(self, move: Move, layer: int, pools: Pools, runs: Sequence[Run]) -> Future[None]:
        """Move runs of blocks of a layer between memory and the file, behind everything that was asked for before."""
        return self._queue.submit(self._transfer, move, self._slots[layer], pools, runs)

    def _transfer(self, move: Move, slot: int, pools: Pools, runs: Sequence[Run]) -> None:
        if self._error is not None:
            raise self._error
        pieces = list(self._pieces(slot, pools, runs))

        def some(first: int) -> None:
            for offset, data in pieces[first::REQUESTS]:
                move(offset, data)

        try:
            list(self._workers.map(some, range(REQUESTS)))
        except BaseException as error:  # a write's is raised where the next layer is waited for
            self._error = error
            raise
        moved = sum(data.nbytes for _, data in pieces)
        if move == self._file.read:
            self.counters.read += moved
        else:
            self.counters.written += moved

    def _pieces(
        self, slot: int, pools: Pools, runs: Sequence[Run]
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Places in the file, and the bytes of memory that belong there."""
        for pool, size, start in zip(pools, self._blocks, self._starts, strict=True):
            data, step = _bytes_of(pool), max(REQUEST_BYTES // size, 1)
            for begin, end in runs:
                for at in range(begin, end, step):
                    part = data[at : min(at + step, end)]
                    yield slot * self._layer_bytes + start + at * size, part.reshape(-1)


def runs(blocks: NDArray[np.int32], gap: int) -> list[Run]:
    """Ascending blocks as runs; those with at most `gap` blocks between them become one."""
    if not len(blocks):
        return []
    cuts = np.flatnonzero(np.diff(blocks) > gap + 1)
    begins, ends = blocks[np.r_[0, cuts + 1]], blocks[np.r_[cuts, len(blocks) - 1]] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def _bytes_of(pool: NDArray[Any]) -> NDArray[np.uint8]:
    """A pool as uint8 [block, bytes of one]."""
    return pool.reshape(len(pool), -1).view(np.uint8)
