"""The file of hosts, which `mpillm doctor --output` writes and `mpillm plan --hosts` reads; people can write one too.

[[hosts]]
name = "pi"          # a name in messages
count = 4            # the number of equal hosts
ranks = 1            # ranks on each host
memory = "7GiB"      # free memory of each host
cores = 4            # cores of each host for its ranks; with more ranks than cores, some ranks are kept in reserve
# The speed of each host, of all its ranks together. Speeds that are absent are assumed.
products = {q4_0 = [20.0, 30.0, 33.0]}  # 10^9 operations/s of products with 1, 4, 16 and 64 rows of activations
attention = [8.0, 12.0]  # 10^9 operations/s of attention: with one row of each sequence, with the rows of a prompt
values_gs = 0.8      # 10^9 values/s of norms, activation functions and quantisation
memory_gbs = 8.0     # 10^9 bytes/s of reading memory
fill_gbs = 4.0       # 10^9 bytes/s of writing to new memory, as while weights are loaded
disk_gbs = 0.4       # 10^9 bytes/s of reading the model's file
disk_pages_gbs = 0.2 # 10^9 bytes/s of reading the model's file in small requests, as pages of weights are read
core = 0.3           # the speed of plain code on one core, relative to a core of Zen 5
part = 0.5           # the part of the time for which a quota (cpu.max) lets each rank run; absent without a quota
latency_us = 120.0   # microseconds of a message to another host, one way
mbit = 940.0         # 10^6 bits/s to and from other hosts
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from mpillm.comm.cores import Cores, node_cores
from mpillm.comm.free_memory import free_memory
from mpillm.errors import JobError
from mpillm.planning.machines import Machines
from mpillm.planning.speed import ASSUMED, KINDS, ROWS, Speed
from mpillm.spec import byte_size
from mpillm.spec.reading import toml
from mpillm.store.directory import replacing
from mpillm.words import count_of

HostCount = Annotated[int, Meta(ge=1, le=2**20)]
Rate = Annotated[float, Meta(gt=0)]
HEAD = "# Written by `mpillm doctor`, for `mpillm plan --hosts`."


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One [[hosts]] table of the file: a kind of host."""

    memory: str | int
    name: str = ""
    count: HostCount = 1
    ranks: HostCount = 1
    cores: HostCount | None = None
    products: (
        Annotated[
            dict[str, Annotated[list[Rate], Meta(min_length=len(ROWS) - 1, max_length=len(ROWS))]],
            Meta(min_length=1),
        ]
        | None
    ) = None
    attention: Annotated[list[Rate], Meta(min_length=2, max_length=2)] | None = None
    values_gs: Rate | None = None
    memory_gbs: Rate | None = None
    fill_gbs: Rate | None = None
    disk_gbs: Rate | None = None
    disk_pages_gbs: Rate | None = None
    core: Rate | None = None
    part: Annotated[float, Meta(gt=0, le=1)] | None = None
    latency_us: Rate | None = None
    mbit: Rate | None = None

    def __post_init__(self) -> None:
        byte_size(self.memory)  # raises ValueError if it is no size
        for kind in self.products or {}:
            if kind not in KINDS:
                raise ValueError(f"products of {kind!r} are unknown; the known ones are {', '.join(KINDS)}")

    @property
    def speed(self) -> Speed:
        """The speed of one rank of the host."""
        products = ASSUMED.products
        if self.products is not None:
            products = {kind: tuple(rate * 1e9 for rate in rates) for kind, rates in self.products.items()}
        one, many = (rate * 1e9 for rate in self.attention) if self.attention else ASSUMED.attention
        return Speed(
            products,
            attention=(one, many),
            values=self.values_gs * 1e9 if self.values_gs else ASSUMED.values,
            fill=self.fill_gbs * 1e9 if self.fill_gbs else ASSUMED.fill,
            core=self.core or ASSUMED.core,
            part=self.part or ASSUMED.part,
            pages=self.disk_pages_gbs * 1e9 if self.disk_pages_gbs else 0.0,
            memory=self.memory_gbs * 1e9 if self.memory_gbs else ASSUMED.memory,
            disk=self.disk_gbs * 1e9 if self.disk_gbs else ASSUMED.disk,
            latency=self.latency_us * 1e-6 if self.latency_us else ASSUMED.latency,
            wire=self.mbit * 1e6 / 8 if self.mbit else ASSUMED.wire,
        ).shared_by(self.ranks)


class Hosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    hosts: Annotated[list[Host], Meta(min_length=1)]


def read(path: Path, ranks: int | None = None) -> Machines:
    """Read the machines of the first `ranks` ranks of a file (None: of all); JobError says what is wrong with it."""
    try:
        found = msgspec.convert(toml(path.read_text("utf-8")), Hosts)
    except OSError as error:
        raise JobError(
            f"The file of hosts {path} cannot be read ({error.strerror}); mpillm doctor --output FILE writes one."
        ) from None
    except ValueError as error:  # the errors of msgspec and TOML are ValueErrors
        raise JobError(
            f"The file of hosts {path} is wrong: {error}. mpillm doctor --output writes such a file; a "
            "hostfile for mpiexec belongs to launch --hostfile."
        ) from None
    machines = machines_of(found.hosts, ranks)
    if ranks is not None and machines.ranks < ranks:
        raise JobError(
            f"The hosts of {path} have {count_of(machines.ranks, 'rank')}, not {ranks}; "
            "add hosts, or ask for fewer."
        )
    return machines


def machines_of(hosts: Sequence[Host], ranks: int | None = None) -> Machines:
    """Return the machines of the first `ranks` ranks of these hosts (None: of all)."""
    per_host, free = list[int](), list[int]()
    names, speeds, cores = list[str](), list[Speed](), list[int]()
    loads = list[tuple[str, float]]()
    for host in hosts:
        speed = host.speed
        for copy in range(host.count):
            used = host.ranks if ranks is None else min(host.ranks, ranks - len(free))
            if used > 0:
                per_host.append(used)
                cores.append(host.cores or 0)
                free += [byte_size(host.memory) // used] * used
                name = host.name or f"host {len(per_host)}"
                names += [f"{name} ({copy + 1})" if host.name and host.count > 1 else name] * used
                speeds += [speed] * used
                # Each rank keeps a core busy if there are not more; else its threads have a part of the cores.
                loads += [(f"host {len(per_host)}", 1 / min(host.cores or used, used))] * used
    measured = all(host.products for host in hosts)
    return Machines(per_host, free, names, speeds, measured, loads=loads, cores=cores)


def alike(ranks: int, ranks_per_host: int, memory: int | None) -> Machines:
    """Return the machines of `ranks` ranks on equal hosts with assumed speeds.

    Each host has `memory` bytes (None: the memory and the cores of this host).
    """
    cores = node_cores([Cores.of_this_process()]) if memory is None else None
    count = -(-ranks // ranks_per_host)
    host = Host(memory=memory or free_memory(), ranks=ranks_per_host, count=count, cores=cores)
    return machines_of([host], ranks)


def write(path: Path, hosts: Sequence[Host]) -> None:
    """Write a file of hosts; OutputError if that is impossible."""
    text = "\n".join([HEAD, *(line for host in hosts for line in _table(host))]) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def _table(host: Host) -> Iterator[str]:
    yield "\n[[hosts]]"
    for key, value in msgspec.to_builtins(host).items():
        if isinstance(value, dict):
            inner = ", ".join(f"{name} = {json.dumps(rates)}" for name, rates in value.items())
            yield f"{key} = {{{inner}}}"
        else:
            yield f"{key} = {json.dumps(value)}"
