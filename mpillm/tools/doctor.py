"""Is this machine, or this cluster, fit for a run? MPI, threads, kernels, memory, the model, the network, the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mpillm import kernels
from mpillm.catalogue import models
from mpillm.comm import probe
from mpillm.comm.probe import LinkTiming
from mpillm.comm.world import World
from mpillm.errors import IMPOSSIBLE, JobError
from mpillm.model.opening import open_source
from mpillm.planning import measure
from mpillm.planning.hosts import Host
from mpillm.planning.measure import Measured
from mpillm.planning.speed import KINDS, ROWS
from mpillm.weights.identity import fingerprint
from mpillm.words import count_of, some_of

SLOW_LINK = 20e6  # bytes per second: less than a fifth of gigabit Ethernet
UNEQUAL = 0.7  # hosts below this part of the fastest host's speed are mentioned
BUSY = 0.5  # cores that other processes use on average

HEAD = ("rank", "host", "cores", "threads", "kernels", "free", "products", "memory", "disk")
LEGEND = (
    "cores: that the ranks of the host may use, and that it has; free: GiB that",
    "the rank can still get, as its control group allows; products: 10^9",
    f"operations/s of Q4_0 with {ROWS[-1]} rows; memory, disk: 10^9 bytes/s read. All",
    "ranks are measured at the same time.",
)


@dataclass(frozen=True)
class _RankFindings:
    """The findings of one rank about its own process and node."""

    cores: int
    cores_of_machine: int
    ranks: int
    threads: int
    load: float  # processes that ran in the last minute, on average
    kernels: str
    why_no_kernels: str
    mpi: str
    model: tuple[int, str] | None
    trouble: str  # with the model, a sentence; "" if none


@dataclass(frozen=True)
class Diagnosis:
    """The report of rank 0: findings, advice, problems that keep a run from working, and the file of hosts."""

    findings: list[str]
    advice: list[str]
    faults: list[str]
    hosts: list[Host]

    @property
    def exit_code(self) -> int:
        """0 if a run would work; advice changes nothing about that."""
        return JobError.exit_code if self.faults else 0

    def lines(self) -> Iterator[str]:
        """Yield all for people; "!" begins what should be seen to."""
        yield from self.findings
        yield from (f"! {line}" for line in (*self.faults, *self.advice))
        if not self.faults:
            yield "A run would work here."


def examine(world: World, model: str | None) -> Diagnosis:
    """Collective: the diagnosis, which takes about two seconds; only rank 0's is complete."""
    path, none_named = world.on_rank_0(lambda: _model(model))
    threads = world.threads()
    world.limit_threads(threads)
    mine, file = _look(world, path, threads)
    everyone = world.gather(mine)
    measured = measure.everyone(world, KINDS, threads, file)
    links = probe.links(world)
    hosts = measure.hosts(world, measured, links)
    findings = [
        f"MPI      {everyone[0].mpi}, {count_of(world.size, 'rank')} on {count_of(len(hosts), 'host')}",
        *_model_found(everyone, path, measured, none_named),
        "",
        *_table(world, everyone, measured),
        "",
        *(_link(world, link) for link in links),
    ]
    advice = [*_about_nodes(world, everyone), *_about_links(world, links), *_about_hosts(hosts)]
    return Diagnosis(findings, advice, list(_faults(world, everyone)), hosts)


def _model(name: str | None) -> tuple[Path | None, str]:
    """Return the model to look for: the named one (fetched if need be), or the default one if it is here."""
    if name is not None:
        return models.resolve(name), ""
    path = models.models_dir() / models.CATALOGUE["smollm2-135m"].file
    if path.exists():
        return path, ""
    return None, "none named, and the default one is not here yet (mpillm pull smollm2-135m)"


def _look(world: World, path: Path | None, threads: int) -> tuple[_RankFindings, Path | None]:
    """Return the findings of this rank, and the largest of the model's files."""
    model, file, trouble = None, None, ""
    if path is not None:
        try:
            source = open_source(path)
            model = fingerprint(source)
            file = max(source.files, key=lambda file: file.stat().st_size)
            source.close()
        except (*IMPOSSIBLE, OSError) as error:
            trouble = str(error)
    found = _RankFindings(
        cores=world.nodes.cores_here,
        cores_of_machine=os.cpu_count() or 1,
        ranks=world.nodes.ranks_here,
        threads=threads,
        load=os.getloadavg()[0],
        kernels=kernels.path(),
        why_no_kernels=kernels.why_missing(),
        mpi=str(probe.mpi_library()),
        model=model,
        trouble=trouble,
    )
    return found, file


def _model_found(
    everyone: Sequence[_RankFindings], path: Path | None, measured: Sequence[Measured], none_named: str
) -> Iterator[str]:
    first = everyone[0].model
    if path is None or first is None:
        yield f"model    {none_named or f'{path}: rank 0 cannot open it (see below)'}"
        return
    yield f"model    {path}: {first[0]} bytes, sampled hash {first[1][:12]}"
    if how := measured[0].disk.how:
        yield f"disk     how it was read: {how}"


def _faults(world: World, everyone: Sequence[_RankFindings]) -> Iterator[str]:
    """Yield the problems that would end a run at its start."""
    first = everyone[0]
    troubles = [one.trouble for one in everyone]
    for trouble in filter(None, dict.fromkeys(troubles)):
        rank, others = troubles.index(trouble), troubles.count(trouble) - 1
        also = f" and {count_of(others, 'other rank')}" if others else ""
        yield f"model: rank {rank} on {world.hosts[rank]}{also}: {trouble}"
    for rank, one in enumerate(everyone):
        where = f"rank {rank} on {world.hosts[rank]}"
        if _version(one) != _version(first):
            yield f"MPI: {where} has {one.mpi}; install the same one everywhere."
        if first.model is not None and one.model is not None and one.model != first.model:
            yield f"model: {where} sees another one ({one.model[0]} bytes, hash {one.model[1][:12]})."


def _version(rank: _RankFindings) -> str:
    return rank.mpi.split(" (")[0]


def _about_nodes(world: World, everyone: Sequence[_RankFindings]) -> Iterator[str]:
    numbers, busy = world.nodes.numbers, dict[str, float]()
    for _, ranks in groupby(sorted(range(world.size), key=numbers.__getitem__), key=numbers.__getitem__):
        rank = next(ranks)
        one, host = everyone[rank], world.hosts[rank]
        if one.ranks * one.threads > one.cores:
            yield f"{host}: more threads than cores; start fewer ranks if you can."
        if one.kernels == "numpy":
            why = (
                f"are missing ({one.why_no_kernels})"
                if one.why_no_kernels
                else "are not used (MPILLM_KERNELS)"
            )
            remedy = "; install gcc and python3-dev, then mpillm again" if one.why_no_kernels else ""
            yield f"{host}: the compiled kernels {why}{remedy}."
        if one.load > one.ranks + BUSY:
            busy[host] = one.load
    if busy:
        where, load = some_of(list(busy), "host"), max(busy.values())
        idle = "it is" if len(busy) == 1 else "they are"
        yield f"{where}: other processes ran meanwhile (load {load:.1f}); measure again when {idle} idle."
    yield from world.nodes.bindings
    yield from world.nodes.clocks


def _about_links(world: World, links: Sequence[LinkTiming]) -> Iterator[str]:
    if slow := [_ends(world, link) for link in links if link.bandwidth < SLOW_LINK]:
        yield (
            f"{some_of(slow, 'link')}: a slow network; stages send least, and wire.between_stages = "
            '"q8_0" a quarter of that.'
        )


def _about_hosts(hosts: Sequence[Host]) -> Iterator[str]:
    """Hosts that are slower than the fastest one."""
    speeds = [(host.products or {}).get("q4_0", [0.0])[-1] for host in hosts]
    for host, speed in zip(hosts, speeds, strict=True):
        if speed < UNEQUAL * max(speeds):
            yield f"{host.name} computes at {100 * speed / max(speeds):.0f} % of the fastest host's speed."


def _link(world: World, link: LinkTiming) -> str:
    return f"network  {_ends(world, link)}: {link.latency * 1e6:.0f} us one way, {link.bandwidth * 8e-6:.0f} Mbit/s"


def _ends(world: World, link: LinkTiming) -> str:
    first, second = (world.hosts[rank] for rank in link.ranks)
    if world.nodes.numbers[link.ranks[0]] == world.nodes.numbers[link.ranks[1]]:
        return f"rank {link.ranks[0]} - rank {link.ranks[1]} on {first}"
    return f"{first} - {second}"


def _table(world: World, everyone: Sequence[_RankFindings], measured: Sequence[Measured]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [HEAD]
    for rank, (one, made) in enumerate(zip(everyone, measured, strict=True)):
        cells = [str(rank), world.hosts[rank], f"{one.cores} of {one.cores_of_machine}", str(one.threads)]
        cells += [
            one.kernels,
            f"{world.nodes.free[rank] / 2**30:.1f}",
            _shown(made.rates.products["q4_0"][-1]),
        ]
        rows.append((*cells, _shown(made.rates.memory), _shown(made.disk.rate)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield from LEGEND


def _shown(rate: float) -> str:
    return f"{rate / 1e9:.3g}" if rate else "-"
