"""Measure in about two seconds what ranks can do: products, memory, and the disk of the model's file."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm import kernels
from mpillm.comm import probe
from mpillm.comm.probe import LinkTiming
from mpillm.comm.world import World
from mpillm.kernels import BlockType
from mpillm.planning.hosts import Host
from mpillm.planning.machines import Machines
from mpillm.planning.speed import ASSUMED, KINDS, ROWS, Products, stand_in
from mpillm.weights.io.reading import SECTOR, new_buffer, open_direct, read_direct
from mpillm.weights.source import Source

WIDTH, NUMPY_WIDTH = 2048, 256  # of the matrix that is multiplied: a layer's of a model of about 10^9 weights
MATRIX_BYTES = 48 * 2**20  # of its copies, which no cache holds: a product of one row reads memory
# Of each timing: so many seconds, and so many calls unless they take longer than PATIENCE.
SECONDS, CALLS, PATIENCE = 0.04, 8, 0.25
MEMORY_BYTES, MEMORY_PIECE = 48 * 2**20, 4 * 2**20  # that are read
DISK_SECONDS = 0.4
REQUEST, READERS = 4 * 2**20, 4  # bytes of a request to the disk, and how many are under way


@dataclass(frozen=True)
class DiskRate:
    """The rate of a file in bytes/s, 0 if it was not read, and how it was measured."""

    rate: float = 0.0
    how: str = ""


@dataclass(frozen=True)
class Measured:
    """What one rank can do while the others of its node work too."""

    products: Products
    memory: float  # bytes/s
    disk: DiskRate


def everyone(world: World, kinds: Sequence[str], threads: int, file: Path | None) -> list[Measured]:
    """Measure on all ranks at the same time (collective); return the results in rank order. `file` is the model's."""
    numbers = world.nodes.numbers
    here = [rank for rank, number in enumerate(numbers) if number == numbers[world.rank]]
    world.barrier()
    products, memory = _product_rates(kinds, threads), _memory_rate(threads)
    world.barrier()
    disk = DiskRate() if file is None else _disk_rate(file, here.index(world.rank), len(here))
    return world.gather(Measured(products, memory, disk))


def machines(world: World, source: Source, threads: int) -> Machines:
    """Measure the ranks' machines for this model (collective); it takes a second or two."""
    kinds = {stand_in(info.type, KINDS) for info in source.tensors.values() if len(info.shape) == 2}
    file = max(source.files, key=lambda file: file.stat().st_size)
    ranks = everyone(world, sorted(kinds), threads, file)
    numbers, found = world.nodes.numbers, hosts(world, ranks, probe.links(world))
    speeds = [
        replace(
            found[number].speed,
            products=rank.products,
            memory=rank.memory or ASSUMED.memory,
            disk=rank.disk.rate or ASSUMED.disk,
        )
        for number, rank in zip(numbers, ranks, strict=True)
    ]
    return Machines(world.nodes.ranks_per_host, world.nodes.free, world.hosts, speeds, measured=True)


def hosts(world: World, ranks: Sequence[Measured], links: Sequence[LinkTiming]) -> list[Host]:
    """Sum the measurements of the ranks of each host, as a file of hosts has them, with its fastest link."""
    numbers, free, found = world.nodes.numbers, world.nodes.free, []
    for number in range(max(numbers) + 1):
        own = [rank for rank, other in enumerate(numbers) if other == number]
        outward = [
            link for link in links if number in (of := [numbers[r] for r in link.ranks]) and of[0] != of[1]
        ]
        found.append(
            Host(
                memory=sum(free[rank] for rank in own),
                name=world.hosts[own[0]],
                ranks=len(own),
                products={
                    kind: [
                        round(sum(ranks[rank].products[kind][at] for rank in own) / 1e9, 3)
                        for at in range(len(ROWS))
                    ]
                    for kind in ranks[own[0]].products
                },
                memory_gbs=_or_none(sum(ranks[rank].memory for rank in own) / 1e9),
                disk_gbs=_or_none(sum(ranks[rank].disk.rate for rank in own) / 1e9),
                latency_us=_or_none(min((link.latency for link in outward), default=0.0) * 1e6),
                mbit=_or_none(max((link.bandwidth for link in outward), default=0.0) * 8e-6),
            )
        )
    return found


def _or_none(rate: float) -> float | None:
    return round(rate, 3) or None


def _product_rates(kinds: Sequence[str], threads: int) -> Products:
    """Operations/s of products with each of ROWS, by kind."""
    return {name: _products(BlockType[name.upper()], threads) for name in kinds}


def _memory_rate(threads: int) -> float:
    """Bytes/s that so many threads read; 0.0 without the compiled kernels."""
    with suppress(ImportError):
        limits: Any = importlib.import_module("mpillm.kernels._limits")
        data = np.ones(MEMORY_BYTES, np.uint8)
        pieces = [data[at : at + MEMORY_PIECE] for at in range(0, MEMORY_BYTES, MEMORY_PIECE)]
        return MEMORY_PIECE / _fastest(lambda piece: limits.read(piece, threads), pieces)
    return 0.0


def _disk_rate(path: Path, part: int = 0, parts: int = 1) -> DiskRate:
    """Measure how fast a file is read in order: past the page cache, or after its pages were dropped.

    Each rank of a host reads another part of the file: number `part` of `parts`.
    """
    size = path.stat().st_size
    begin, end = (at * size // parts // SECTOR * SECTOR for at in (part, part + 1))
    places = range(begin, end - REQUEST + 1, REQUEST)
    if not places:
        return DiskRate(0.0, "the file is too small")
    direct = open_direct(path)
    try:
        if direct >= 0 and read_direct(direct, begin, new_buffer(SECTOR, SECTOR)):
            return DiskRate(_rate(places, lambda at, out: read_direct(direct, at, out)), "O_DIRECT")
    finally:
        if direct >= 0:
            os.close(direct)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
        return DiskRate(
            _rate(places, lambda at, out: os.preadv(file.fileno(), [out.data], at) == len(out)),
            "pages dropped first",
        )


def _rate(places: Sequence[int], read: Callable[[int, NDArray[np.uint8]], bool]) -> float:
    """Bytes/s of reads at these places, as many as DISK_SECONDS allow."""
    buffers = [new_buffer(REQUEST, SECTOR) for _ in range(READERS)]
    for buffer in buffers:
        buffer[:] = 0  # so that the time of getting its pages is not counted
    start, remaining = time.perf_counter(), iter(places)

    def reader(buffer: NDArray[np.uint8]) -> int:
        done = 0
        while (at := next(remaining, None)) is not None and time.perf_counter() < start + DISK_SECONDS:
            done += REQUEST if read(at, buffer) else 0
        return done

    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(reader, buffers))
    return total / (time.perf_counter() - start)


def _products(kind: BlockType, threads: int) -> list[float]:
    width, copies = (NUMPY_WIDTH, 1) if kernels.path() == "numpy" else (WIDTH, 0)
    bounds = np.array([0, width], np.int32)
    packed = np.empty(kernels.packed_nbytes(kind, width, width, bounds), np.uint8)
    kernels.pack(kind, np.zeros((width, kind.row_bytes(width)), np.uint8), width, bounds, packed)
    matrices = [packed, *(packed.copy() for _ in range(copies or MATRIX_BYTES // packed.nbytes))]
    rates = []
    for rows in ROWS:
        values = np.zeros((rows, width), np.float32)
        x: NDArray[np.generic] = values
        if kind.quantised:
            x = blocks = np.empty((rows, kernels.activation_nbytes(width, bounds)), np.uint8)
            kernels.quantize_rows(values, bounds, blocks)
        out = np.empty((rows, width), np.float32)

        def call(
            matrix: NDArray[np.uint8], x: NDArray[np.generic] = x, out: NDArray[np.float32] = out
        ) -> None:
            kernels.matmul(kind, matrix, width, width, bounds, x, out, threads)

        rates.append(2 * width * width * rows / _fastest(call, matrices))
    return rates


def _fastest(call: Callable[[NDArray[np.uint8]], object], data: Sequence[NDArray[np.uint8]]) -> float:
    """Seconds of the fastest call, with each of `data` in turn: the one that other programs disturbed least."""
    call(data[0])
    best, turn, first = float("inf"), 0, time.perf_counter()
    while (passed := time.perf_counter() - first) < SECONDS or (turn < CALLS and passed < PATIENCE):
        start = time.perf_counter()
        call(data[turn % len(data)])
        best, turn = min(best, time.perf_counter() - start), turn + 1
    return best
