"""Measure the speeds of ranks in about a second or less: their kernels, their memory, and the disk of the model."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpillm.comm.probe import LinkTiming
from mpillm.comm.world import World
from mpillm.planning.hosts import Host
from mpillm.planning.kernel_rates import MEMORY, KernelRates, kernel_rates
from mpillm.planning.memory import loading
from mpillm.planning.speed import ASSUMED, KINDS, LARGE, SMALL, Products, Speed, stand_in
from mpillm.weights.io.filesystem import cached
from mpillm.weights.io.reading import SECTOR, new_buffer, open_direct, read_direct
from mpillm.weights.source import Source

# The maximum bytes that a rank of a run takes for measuring; and the part of them that it is planned to take later for
# libraries and its heap.
WITHIN_RUN, LATER = 48 * 2**20, 6 * 2**20
MOST = 2**30  # the maximum bytes of new memory that are written
QUICKLY = 0.08  # the effort in a run that may take only seconds
# The two measurements of a disk: bytes of a request, requests under way, seconds.
WHOLE, PAGES = (LARGE, 4, 0.3), (SMALL, 1, 0.1)


@dataclass(frozen=True)
class DiskRate:
    """The rate of reading a file in bytes/s (0: it was not read), and how it was measured."""

    rate: float = 0.0
    how: str = ""
    pages: float = 0.0  # the rate with small requests, as pages of weights are read


@dataclass(frozen=True)
class Measured:
    """The rates of one rank while the other ranks of its node work too."""

    rates: KernelRates
    disk: DiskRate
    part: float = 1.0  # the part of a core that a quota allows each thread


def everyone(
    world: World,
    kinds: Sequence[str],
    threads: int,
    file: Path | None,
    memory: int = MEMORY,
    effort: float = 1.0,
    most: int = MOST,
    kept: bool = False,
) -> list[Measured]:
    """Measure on all ranks at the same time (collective); return the results in rank order.

    `file` is that of the model (None: no disk is measured); if it is to be `kept` in memory, a brief measurement only
    looks whether it is in the page cache. A rank takes `memory` bytes, and up to `most` for a moment. Each timing takes
    `effort` times its usual seconds.
    """
    numbers = world.nodes.numbers
    here = [rank for rank, number in enumerate(numbers) if number == numbers[world.rank]]
    world.barrier()
    most = min(most, world.nodes.free[world.rank] // 8)
    quota = world.nodes.part_by_quota(threads)
    rates = kernel_rates(kinds, threads, memory, effort, most, world.barrier, quota)
    world.barrier()
    disk = DiskRate()
    if file is not None and kept and effort < 1 and _cached(file):
        disk = DiskRate(rates.memory, "the page cache has it")
    elif file is not None:
        disk = _disk_rate(file, here.index(world.rank), len(here), effort)
    return world.gather(Measured(rates, disk, quota))


def speeds(
    world: World,
    source: Source,
    threads: int,
    effort: float = 1.0,
    budget: int | None = None,
) -> list[Speed]:
    """Measure the speeds of all ranks for this model, but not their links (collective).

    That takes about a second times `effort`. `budget` is the maximum number of bytes of weights that this rank will
    hold (None: all); measuring takes little more. With an effort less than 1, the products of the block type of most
    weights are measured, and those of other types follow from them.
    """
    weights = Counter[str]()
    for info in source.tensors.values():
        if len(info.shape) == 2:
            weights[stand_in(info.type, KINDS)] += math.prod(info.shape)
    kinds = [kind for kind, _ in weights.most_common(1 if effort < 1 else None)]
    file = max(source.files, key=lambda file: file.stat().st_size)
    share = sum(file.stat().st_size for file in source.files) // world.size
    most = min(share, MOST if budget is None else budget)
    # No more than the run itself takes. Tiny models have few weights, but loading takes memory besides them.
    memory = min(WITHIN_RUN, most + loading(source, most) + LATER)
    ranks = everyone(world, kinds, threads, file, memory, effort, most, kept=budget is None)
    return [
        Speed(
            products=_with_others(rank.rates.products, kinds[0], list(weights)),
            memory=rank.rates.memory or ASSUMED.memory,
            attention=rank.rates.attention,
            values=rank.rates.values,
            fill=rank.rates.fill,
            core=rank.rates.core,
            part=rank.part,
            disk=rank.disk.rate or ASSUMED.disk,
            pages=rank.disk.pages,
            latency=ASSUMED.latency,
            wire=ASSUMED.wire,
        )
        for rank in ranks
    ]


def linked(world: World, speeds: Sequence[Speed], links: Sequence[LinkTiming]) -> list[Speed]:
    """Return the speeds of ranks, with the measured links of their hosts; equal speeds are one object."""
    found, known = list[Speed](), dict[tuple[int, int], Speed]()
    for speed, number in zip(speeds, world.nodes.numbers, strict=True):
        outward = _outward(world, links, number)
        own = replace(
            speed,
            latency=min(link.latency for link in outward),
            wire=max(link.bandwidth for link in outward),
        )
        found.append(known.setdefault((id(speed), number), own))
    return found


def _outward(world: World, links: Sequence[LinkTiming], number: int) -> list[LinkTiming]:
    """Return the links of the host with this number to other hosts."""
    numbers = world.nodes.numbers
    return [link for link in links if number in (of := [numbers[r] for r in link.ranks]) and of[0] != of[1]]


def _with_others(measured: Products, main: str, kinds: Sequence[str]) -> Products:
    """Return the rates of products of all `kinds`: if not measured, in proportion to those of type `main`."""
    assumed = ASSUMED.products
    return {
        kind: measured.get(kind)
        or [
            rate * other / own
            for rate, other, own in zip(measured[main], assumed[kind], assumed[main], strict=True)
        ]
        for kind in kinds
    }


def hosts(world: World, ranks: Sequence[Measured], links: Sequence[LinkTiming]) -> list[Host]:
    """Sum the measurements of each host's ranks, as in a file of hosts; its link is the fastest one of its ranks."""
    numbers, free, found = world.nodes.numbers, world.nodes.free, []
    for number in range(max(numbers) + 1):
        own = [rank for rank, other in enumerate(numbers) if other == number]
        outward = _outward(world, links, number)
        found.append(
            Host(
                memory=sum(free[rank] for rank in own),
                name=world.hosts[own[0]],
                ranks=len(own),
                cores=world.nodes.cores[number],
                products={
                    kind: summed([ranks[rank].rates.products[kind] for rank in own])
                    for kind in ranks[own[0]].rates.products
                },
                memory_gbs=_or_none(sum(ranks[rank].rates.memory for rank in own) / 1e9),
                fill_gbs=_or_none(sum(ranks[rank].rates.fill for rank in own) / 1e9),
                attention=summed([ranks[rank].rates.attention for rank in own]),
                values_gs=_or_none(sum(ranks[rank].rates.values for rank in own) / 1e9),
                core=round(sum(ranks[rank].rates.core for rank in own) / len(own), 3),
                part=round(part, 3) if (part := min(ranks[rank].part for rank in own)) < 1 else None,
                disk_gbs=_or_none(sum(ranks[rank].disk.rate for rank in own) / 1e9),
                disk_pages_gbs=_or_none(sum(ranks[rank].disk.pages for rank in own) / 1e9),
                latency_us=_or_none(min((link.latency for link in outward), default=0.0) * 1e6),
                mbit=_or_none(max((link.bandwidth for link in outward), default=0.0) * 8e-6),
            )
        )
    return found


def summed(rates: Sequence[Sequence[float]]) -> list[float]:
    """Return the sums of the ranks' operations/s, in units of 10^9."""
    return [round(sum(of_all) / 1e9, 3) for of_all in zip(*rates, strict=True)]


def _or_none(rate: float) -> float | None:
    return round(rate, 3) or None


def _cached(path: Path) -> bool:
    """Return whether the page cache has a file, most likely."""
    with path.open("rb", buffering=0) as file:
        return cached(file.fileno(), 0, path.stat().st_size)


def _disk_rate(path: Path, part: int = 0, parts: int = 1, effort: float = 1.0) -> DiskRate:
    """Measure how fast a file is read in order: without the page cache, or after its pages were dropped from it.

    Each rank of a host reads its own part of the file: number `part` of `parts`.
    """
    size = path.stat().st_size
    begin, end = (at * size // parts // SECTOR * SECTOR for at in (part, part + 1))
    if end - begin < LARGE:
        return DiskRate(0.0, "the file is too small")
    direct = open_direct(path)
    try:
        if direct >= 0 and read_direct(direct, begin, new_buffer(SECTOR, SECTOR)):
            whole, pages = (
                _rate(begin, end, kind, effort, lambda at, out: read_direct(direct, at, out))
                for kind in (WHOLE, PAGES)
            )
            return DiskRate(whole, "O_DIRECT", pages)
    finally:
        if direct >= 0:
            os.close(direct)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
        rate = _rate(
            begin, end, WHOLE, effort, lambda at, out: os.preadv(file.fileno(), [out.data], at) == len(out)
        )
        return DiskRate(rate, "pages dropped first")


def _rate(
    begin: int,
    end: int,
    kind: tuple[int, int, float],
    effort: float,
    read: Callable[[int, NDArray[np.uint8]], bool],
) -> float:
    """Bytes/s of reading a file from offset `begin` to `end`, or as far as there is time."""
    request, readers, seconds = kind
    buffers = [new_buffer(request, SECTOR) for _ in range(readers)]
    for buffer in buffers:
        buffer[:] = 0  # the time for getting the buffer's pages does not count
    start, remaining = time.perf_counter(), iter(range(begin, end - request + 1, request))

    def reader(buffer: NDArray[np.uint8]) -> int:
        done = 0
        while (at := next(remaining, None)) is not None and time.perf_counter() < start + effort * seconds:
            done += request if read(at, buffer) else 0
        return done

    with ThreadPoolExecutor(readers) as pool:
        total = sum(pool.map(reader, buffers))
    return total / (time.perf_counter() - start)
