"""Is this machine, or this cluster, fit for a run? MPI, threads, kernels, the model, the network and the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from mpillm import kernels
from mpillm.comm import probe
from mpillm.comm.world import World
from mpillm.errors import MpillmError
from mpillm.model.opening import open_source
from mpillm.run import catalogue
from mpillm.weights.identity import fingerprint

READ = 256 * 2**20  # bytes of the model that are read to see how fast the disk is
CHUNK = 8 * 2**20
SLOW_LINK = 20e6  # bytes per second: less than a fifth of gigabit Ethernet


@dataclass(frozen=True)
class _Rank:
    """What one rank finds out about its own node."""

    cores: int
    ranks: int
    threads: int
    oversubscribed: bool
    kernels: str
    memory: int  # bytes that are free
    mpi: str
    model: tuple[int, str] | None
    trouble: str  # with the model, a sentence; "" if none
    disk: float  # bytes per second, 0 if not measured


def examine(world: World, model: str | None) -> Iterator[str]:
    """Collective: the findings line by line on rank 0, nothing on the others; "!" begins what should be seen to."""
    path, trouble = None, ""
    if world.rank == 0:
        try:
            path, trouble = _model(model)
        except MpillmError as error:
            trouble = str(error)
    path, trouble = world.bcast((path, trouble))
    mine = _look(world, path, trouble)
    everyone = world.gather(mine)
    measured = probe.links(world)
    if world.rank == 0:
        yield from _mpi(world, everyone)
        yield from _nodes(world, everyone)
        yield from _same_model(world, everyone, path)
        yield from _network(world, measured)


def _model(name: str | None) -> tuple[Path | None, str]:
    """The model to look for: the one that was named (fetched if need be), or the default one if it is there already."""
    if name is not None:
        return catalogue.resolve(name), ""
    path = catalogue.models_dir() / catalogue.CATALOGUE["smollm2-135m"].file
    if path.exists():
        return path, ""
    return None, "none named, and the default one is not here yet (mpillm pull smollm2-135m)"


def _look(world: World, path: Path | None, trouble: str) -> _Rank:
    model, disk = None, 0.0
    if path is not None:
        try:
            source = open_source(path)
            model = fingerprint(source)
            source.close()
            disk = _read_rate(max(source.files, key=lambda file: file.stat().st_size))
        except (MpillmError, OSError) as error:
            trouble = str(error)
    return _Rank(
        cores=world.nodes.cores_here,
        ranks=world.nodes.ranks_here,
        threads=world.threads(),
        oversubscribed=world.oversubscribed,
        kernels=kernels.path(),
        memory=psutil.virtual_memory().available,
        mpi=str(probe.mpi_library()),
        model=model,
        trouble=trouble,
        disk=disk,
    )


def _read_rate(path: Path) -> float:
    """Bytes per second of a sequential read that the page cache does not serve (as far as the system lets go of it)."""
    with path.open("rb", buffering=0) as file:
        length = min(READ, os.fstat(file.fileno()).st_size)
        os.posix_fadvise(file.fileno(), 0, length, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        done = 0
        while done < length and (data := file.read(min(CHUNK, length - done))):
            done += len(data)
    return done / max(time.perf_counter() - start, 1e-9)


def _mpi(world: World, everyone: list[_Rank]) -> Iterator[str]:
    yield f"  MPI      {everyone[0].mpi}, {world.size} rank(s) on {len(set(world.hosts))} host(s)"
    for rank, other in enumerate(everyone):
        if other.mpi.split(" (")[0] != everyone[0].mpi.split(" (")[0]:
            yield f"! MPI      rank {rank} on {world.hosts[rank]} has {other.mpi}: install the same one everywhere"


def _nodes(world: World, everyone: list[_Rank]) -> Iterator[str]:
    seen: set[str] = set()
    for rank, one in enumerate(everyone):
        host = world.hosts[rank]
        if host in seen:
            continue
        seen.add(host)
        yield (
            f"  node     {host}: {one.cores} cores, {one.ranks} rank(s) x {one.threads} thread(s), "
            f"kernels {one.kernels}, {one.memory / 2**30:.1f} GiB free"
        )
        if one.oversubscribed:
            yield f"! node     {host}: more threads than cores; ranks that wait sleep, but start fewer ranks if you can"
        if one.kernels == "numpy":
            yield f"! node     {host}: the compiled kernels are missing; install gcc and python3-dev, then mpillm again"
    yield from (f"! node     {line}" for line in world.nodes.bindings)


def _same_model(world: World, everyone: list[_Rank], path: Path | None) -> Iterator[str]:
    first = everyone[0]
    if path is None or first.model is None:
        yield f"! model    {first.trouble}"
        return
    yield f"  model    {path}: {first.model[0]} bytes, sampled hash {first.model[1][:12]}"
    for rank, one in enumerate(everyone):
        host = world.hosts[rank]
        if one.model is None:
            yield f"! model    rank {rank} on {host}: {one.trouble}"
        elif one.model != first.model:
            yield f"! model    rank {rank} on {host} sees another one ({one.model[0]} bytes, hash {one.model[1][:12]})"
    hosts = {host: one.disk for host, one in zip(world.hosts, everyone, strict=True) if one.disk}
    for host, rate in hosts.items():
        yield f"  disk     {host}: the model is read at {rate / 1e6:.0f} MB/s"


def _network(world: World, measured: list[probe.Link]) -> Iterator[str]:
    for link in measured:
        mark = "!" if link.bandwidth < SLOW_LINK else " "
        where = "the same host" if world.hosts[link.rank] == world.hosts[0] else world.hosts[link.rank]
        yield (
            f"{mark} network  rank 0 to rank {link.rank} ({where}): {link.latency * 1e6:.0f} us, "
            f"{link.bandwidth / 1e6:.0f} MB/s"
        )
