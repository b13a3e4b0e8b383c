"""Pools of the KV cache that lie in a file and pass through memory once a step, like the weights that are streamed.

A step needs a layer's keys and values only while it is at that layer. So where the blocks of all sequences do not fit
into memory for all pools, some pools stay, and the layers of the others take turns in two buffers of one pool's size:
while one is computed on, the next one is read into the other, where the one before has just been written back. Block
numbers, block tables and the bits of every value stay as they are. In the file each pool's keys, and its values, lie
one block after the other, so what a step needs of them is a few long pieces; written back are the blocks that the step
has changed. Layers of different groups may share a pool, but never a block: each reads and writes those of its group.

When it pays. Let a step stream W bytes of weights, and memory hold K bytes of KV cache, which is n sequences. The disk
then reads W / n bytes for each token. With x more sequences, and X bytes of KV cache read for each step, it is
(W + X) / (n + x) bytes, where X / x is never less than K / n, what a sequence takes. So it pays if K < W, the more the
larger X; at X = W a token costs (1 + W / K) / 2 times less, and no X makes that more than twice as much. Therefore as
many blocks are offered as keep X <= W, and none if nothing is streamed. (All this where the disk is the limit: where
computing is, neither costs anything.)

With b blocks in use, all pools stay if they fit into memory, else as many as fit beside two buffers.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpillm import tracing
from mpillm.model.spill_file import SpillFile

Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]
LayerPools = tuple[Bytes, Bytes]  # keys and values, each [block, bytes of one]
Run = tuple[int, int]  # neighbouring blocks: the first one, and the one behind the last
Move = Callable[[int, Bytes], None]

BUFFERS = 2
REQUESTS = 4  # under way at a time
REQUEST_BYTES = 4 * 2**20
GAP_BYTES = 128 * 1024  # read along where it lies between what is needed: a request of its own takes as long
HUGE = 4 * 2**20  # bytes from which on NumPy asks for memory in huge pages
HUGE_PAGE = 2 * 2**20
PAGE = 4096  # what direct transfers are aligned to
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly however many one takes


def pools_in_file(sizes: Sequence[int], budget: int, blocks: int) -> list[int]:
    """Return the pools that lie in the file when `blocks` blocks are in use, in the order in which they leave memory.

    `sizes` has the bytes of one block in each pool. They are spread evenly, so that there is about as much to compute
    between any two turns.
    """
    held, leaving = sum(sizes) * blocks, list[int]()
    order = sorted(range(len(sizes)), key=lambda pool: (pool + 1) * _GOLDEN % 1.0)
    buffers = BUFFERS * max(sizes, default=0) * blocks
    while held > budget and len(leaving) < len(order):
        if not leaving:
            held += buffers
        leaving.append(order[len(leaving)])
        held -= sizes[leaving[-1]] * blocks
    return leaving


def nbytes_in_file(sizes: Sequence[int], budget: int, blocks: int) -> int:
    """Return bytes that lie in the file then, and are read for each step."""
    return sum(sizes[pool] for pool in pools_in_file(sizes, budget, blocks)) * blocks


def maximum_blocks(sizes: Sequence[int], budget: int, traffic: int) -> int:
    """Return the largest number of blocks that can be used if a step reads at most `traffic` bytes of them."""
    minimum = budget // sum(sizes)
    maximum = max(budget // (BUFFERS * max(sizes)), minimum)
    while minimum < maximum:
        blocks = (minimum + maximum + 1) // 2
        if nbytes_in_file(sizes, budget, blocks) <= traffic:
            minimum = blocks
        else:
            maximum = blocks - 1
    return minimum


@dataclass
class SpillCounters:
    """The bytes that went to the file and came from it, and the seconds of waiting for them."""

    written: int = 0
    read: int = 0
    stalls: int = 0
    stall_seconds: float = 0.0


class Spill:
    """A rank's pools in a file. Layers, pools and blocks are numbers; transfers happen in the order of the calls."""

    def __init__(
        self,
        folder: Path,
        pools: Sequence[tuple[int, int]],
        layers: Sequence[tuple[int, int] | None],
        budget: int,
        n_blocks: int,
    ) -> None:
        """Raises JobError if there is no file to be had.

        `pools` has the bytes of a block's keys and of its values in each pool; `layers` has each layer's pool and
        group, None for a layer without keys and values; `budget` is in bytes.
        """
        self.counters = SpillCounters()
        self._pools, self._layers, self._budget, self._n_blocks = pools, layers, budget, n_blocks
        self._sizes = [sum(nbytes) for nbytes in pools]
        self._starts: dict[int, int] = {}  # by pool: where it begins in the file
        self._end = 0
        self._buffers: list[LayerPools] = []
        self._turns: list[int] = []  # this step's layers of the file, in order
        self._turn = 0
        self._reads: dict[int, Future[None]] = {}
        self._reading: list[list[Run]] = []  # by group
        self._writing: list[list[Run]] = []
        self._top = 0  # blocks that have been in use
        self._error: BaseException | None = None
        nbytes = nbytes_in_file(self._sizes, budget, n_blocks)
        aligned = all(size % PAGE == 0 for both in pools for size in both)
        self._file = SpillFile(folder, nbytes, aligned)
        self._queue = ThreadPoolExecutor(1, "kv-order")
        self._workers = ThreadPoolExecutor(REQUESTS, "kv-move")

    @property
    def layers(self) -> int:
        """The number of layers whose blocks are in the file."""
        return sum(layer is not None and layer[0] in self._starts for layer in self._layers)

    @property
    def held(self) -> int:
        """Bytes of memory that its buffers and the pools that stay take."""
        in_memory = sum(size for pool, size in enumerate(self._sizes) if pool not in self._starts)
        return self._top * (in_memory + (BUFFERS * max(self._sizes) if self._starts else 0))

    def make_space(self, top: int, pools: list[LayerPools | None]) -> None:
        """Write those of `pools` that must leave before the first `top` blocks are used; None stays in their place."""
        before, self._top = self._top, max(self._top, top)
        for pool in pools_in_file(self._sizes, self._budget, self._top)[len(self._starts) :]:
            leaving, pools[pool] = pools[pool], None
            self._starts[pool] = self._end
            self._end += self._sizes[pool] * self._n_blocks
            assert leaving is not None
            if before:
                self._do(self._file.write, pool, leaving, [(0, before)]).result()

    def begin(self, needed: Sequence[Ints], changed: Sequence[Ints]) -> None:
        """Begin a step that reads the blocks `needed` of each group and writes those `changed` (both ascending)."""
        if not self._buffers:
            keys, values = (max(size) for size in zip(*self._pools, strict=True))
            self._buffers = [new_pool(self._n_blocks, (keys, values)) for _ in range(BUFFERS)]
        self._turns, self._turn = [], 0
        for number, layer in enumerate(self._layers):
            if layer is not None and layer[0] in self._starts:
                self._turns.append(number)
        gap = GAP_BYTES // max(size for both in self._pools for size in both)
        self._reading = [runs(blocks, gap) for blocks in needed]
        self._writing = [runs(blocks, 0) for blocks in changed]
        for turn in range(min(BUFFERS, len(self._turns))):
            self._read(turn)

    def acquire(self, layer: int) -> LayerPools:
        """Return the pool of the layer whose turn it is, when its blocks have been read."""
        assert layer == self._turns[self._turn], (layer, self._turns, self._turn)
        arrived = self._reads.pop(layer)
        if not arrived.done():
            since = time.perf_counter()
            wait([arrived])
            self.counters.stalls += 1
            seconds = time.perf_counter() - since
            self.counters.stall_seconds += seconds
            tracing.spent("wait for the KV cache", seconds)
        arrived.result()
        return self._buffer(self._turn)

    def release(self, layer: int) -> None:
        """Release the layer that was acquired last: write its changes, and read what has its buffer next."""
        pool, group = self._of(layer)
        self._do(self._file.write, pool, self._buffer(self._turn), self._writing[group])
        self._turn += 1
        if self._turn + BUFFERS - 1 < len(self._turns):
            self._read(self._turn + BUFFERS - 1)

    def close(self) -> None:
        """Stop the threads and give the file's space back."""
        self._queue.shutdown()
        self._workers.shutdown()
        self._file.close()

    def _of(self, layer: int) -> tuple[int, int]:
        """Return a layer's pool and group."""
        found = self._layers[layer]
        assert found is not None, layer
        return found

    def _buffer(self, turn: int) -> LayerPools:
        """Return the buffer of a turn, in the form of its layer's pool."""
        pool, _ = self._of(self._turns[turn])
        keys, values = (
            memory.reshape(-1)[: self._n_blocks * nbytes].reshape(self._n_blocks, nbytes)
            for memory, nbytes in zip(self._buffers[turn % BUFFERS], self._pools[pool], strict=True)
        )
        return keys, values

    def _read(self, turn: int) -> None:
        layer = self._turns[turn]
        pool, group = self._of(layer)
        self._reads[layer] = self._do(self._file.read, pool, self._buffer(turn), self._reading[group])

    def _do(self, move: Move, pool: int, memory: LayerPools, runs: Sequence[Run]) -> Future[None]:
        """Move runs of a pool's blocks between memory and the file, behind everything that was asked for before."""
        return self._queue.submit(self._transfer, move, pool, memory, runs)

    def _transfer(self, move: Move, pool: int, memory: LayerPools, runs: Sequence[Run]) -> None:
        if self._error is not None:
            raise self._error
        pieces = list(self._pieces(pool, memory, runs))

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

    def _pieces(self, pool: int, memory: LayerPools, runs: Sequence[Run]) -> Iterator[tuple[int, Bytes]]:
        """Places in the file, and the bytes of memory that belong there."""
        start = self._starts[pool]
        for data in memory:
            size = data.shape[1]
            if not size:  # values that are a part of the keys
                continue
            step = max(REQUEST_BYTES // size, 1)
            for begin, end in runs:
                for at in range(begin, end, step):
                    yield start + at * size, data[at : min(at + step, end)].reshape(-1)
            start += size * self._n_blocks


def new_pool(n_blocks: int, nbytes: tuple[int, int]) -> LayerPools:
    """Memory for the keys and values of `n_blocks` blocks of `nbytes` each, all zero; used as it is touched."""
    keys, values = (_zeros(n_blocks * size).reshape(n_blocks, size) for size in nbytes)
    return keys, values


def _zeros(nbytes: int) -> Bytes:
    """Zeros in memory of their own that begins at a page and goes with them."""
    if not nbytes:  # a mapping of 0 bytes is impossible
        return np.empty(0, np.uint8)
    if nbytes < HUGE:
        return np.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Elsewhere than at the begin of a huge page it would touch one more, and so would a part of one at the end.
    begin, whole = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE, nbytes // HUGE_PAGE * HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, begin, whole)
        memory.madvise(mmap.MADV_NOHUGEPAGE, begin + whole, HUGE_PAGE - begin + nbytes - whole)
    return np.frombuffer(memory, np.uint8, nbytes, begin)


def runs(blocks: Ints, gap: int) -> list[Run]:
    """Ascending blocks as runs; those with at most `gap` blocks between them become one."""
    if not len(blocks):
        return []
    cuts = np.flatnonzero(np.diff(blocks) > gap + 1)
    begins, ends = blocks[np.r_[0, cuts + 1]], blocks[np.r_[cuts, len(blocks) - 1]] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
