"""Find where the ranks are: which of them share a machine, and which cores that machine gives them."""

from __future__ import annotations

import itertools
import os
import pathlib
import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mpillm import version
from mpillm.comm import core_speed
from mpillm.comm.cores import (
    THREADS,
    Cores,
    binding,
    cores_of_time,
    node_cores,
    reserve_in_words,
    threads_per_rank,
    with_cores,
)
from mpillm.comm.faults import Process
from mpillm.comm.free_memory import free_memory
from mpillm.words import count_of, some_of

CLOCKS = 60.0  # seconds by which hosts' clocks may differ; ranks do not start at the same moment


@dataclass(frozen=True)
class RankInfo:
    """The facts that a rank tells all others about where it runs."""

    host: str
    boot: str  # tells machines of one name apart (all of a box of Raspberry Pis may be called the same)
    cores: Cores
    process: Process
    free: int  # bytes of memory that its machine, or its control group, has left
    version: str  # the version of mpillm
    clock: float  # the time of day, in seconds
    pace: float = 1.0  # see `core_speed`
    environ: Mapping[str, str] = field(default_factory=dict)  # what says how many threads it has

    @classmethod
    def of_this_process(cls) -> RankInfo:
        """Return the facts about this process that it tells the others."""
        return cls(
            socket.gethostname(),
            _boot_id(),
            Cores.of_this_process(),
            Process.own(),
            free_memory(),
            version.with_sources(),
            time.time(),
            core_speed.pace(),
            {name: os.environ[name] for name in THREADS if name in os.environ},
        )

    @property
    def node(self) -> tuple[str, str]:
        """The machine, or a container of it that has a name of its own."""
        return self.host, self.boot

    @property
    def machine(self) -> str:
        """The machine whose cores this rank uses, which may be several nodes."""
        return self.boot or self.host


class Nodes:
    """The machines of all ranks, seen from one of them."""

    def __init__(self, rank: int, ranks: Sequence[RankInfo]) -> None:
        """`ranks` in rank order; `rank` is this one's number."""
        own = ranks[rank].node
        here = [number for number, other in enumerate(ranks) if other.node == own]
        at = here.index(rank)
        #: lengths of the runs of consecutive ranks on one machine, as `grid.choose` takes them
        self.ranks_per_host: tuple[int, ...] = tuple(
            len(list(run)) for _, run in itertools.groupby(other.node for other in ranks)
        )
        self.with_rank_0 = own == ranks[0].node
        self.ranks_here = len(here)
        self.cores_here = node_cores([ranks[number].cores for number in here])
        #: the other ranks of this machine, starting with the next one
        self.neighbours = [ranks[number].process for number in (*here[at + 1 :], *here[:at])]
        self._rank, self._ranks = rank, ranks

    def oversubscribed(self, threads: int) -> bool:
        """Return whether threads may have to wait for a core if each rank has `threads` of them.

        This host, or the machine that it shares with other hosts, has fewer cores, or a quota allows less time of them.
        """
        own = self._ranks[self._rank]
        together = (
            [rank.cores for rank in self._ranks if rank.node == own.node],
            [rank.cores for rank in self._ranks if rank.machine == own.machine],
        )
        return any(len(ranks) * threads > cores_of_time(ranks) for ranks in together)

    def part_by_quota(self, threads: int) -> float:
        """Return the part of a core that a quota leaves to each of this rank's threads; 1 if it leaves whole ones."""
        own = self._ranks[self._rank]
        sharing = sum(
            rank.node == own.node and rank.cores.quota_at == own.cores.quota_at for rank in self._ranks
        )
        return min(own.cores.quota / (sharing * threads), 1.0) if own.cores.quota else 1.0

    @property
    def free(self) -> list[int]:
        """Bytes of memory that are free for each rank: those of a machine share what it has."""
        count = Counter(rank.node for rank in self._ranks)
        return [rank.free // count[rank.node] for rank in self._ranks]

    def crowded(self, ranks: Collection[int]) -> bool:
        """Return whether a machine of these ranks has fewer cores than ranks.

        Containers of one machine have names of their own, but share its cores.
        """
        on = {self._ranks[rank].machine for rank in ranks}
        cores: dict[str, list[Cores]] = {machine: [] for machine in on}
        for rank in self._ranks:
            if rank.machine in on:
                cores[rank.machine].append(rank.cores)
        return any(len(own) > node_cores(own) for own in cores.values())

    def with_cores(self, threads: object) -> list[int]:
        """Return the ranks that have cores of their own: the first ones of a machine with more ranks than cores.

        `threads` are those that the job asks for. Ranks that are bound to different cores all have their own.
        """
        surplus = {rank for ranks in self._surplus(threads).values() for rank in ranks}
        return [rank for rank in range(len(self._ranks)) if rank not in surplus]

    def surplus_in_words(self, threads: object) -> list[str]:
        """Return sentences for the user about the other ranks."""
        said: dict[str, list[str]] = {}
        for node, surplus in self._surplus(threads).items():
            there = [rank for rank in self._ranks if rank.node == node]
            cores = node_cores([rank.cores for rank in there])
            text = reserve_in_words(len(there), cores, len(there) - len(surplus))
            said.setdefault(text, []).append(there[0].host)
        return [
            f"On {some_of(names, 'host')}, {text}; set layout.shards, layout.stages or layout.replicas to use all."
            for text, names in said.items()
        ]

    @property
    def cores(self) -> list[int]:
        """The number of cores of each machine's ranks, by the number of the machine."""
        return [
            node_cores(
                [rank.cores for rank, own in zip(self._ranks, self.numbers, strict=True) if own == number]
            )
            for number in range(max(self.numbers) + 1)
        ]

    def _surplus(self, threads: object) -> dict[tuple[str, str], list[int]]:
        """Return the ranks of each machine that have no core of their own."""
        here: dict[tuple[str, str], list[int]] = {}
        for number, rank in enumerate(self._ranks):
            here.setdefault(rank.node, []).append(number)
        found = {}
        for node, numbers in here.items():
            own = [self._ranks[number].cores for number in numbers]
            given = threads != "auto" or any(self._ranks[number].environ for number in numbers)
            used = with_cores(len(own), node_cores(own), given)
            if used < len(own) and len({one.affinity for one in own}) == 1:
                found[node] = numbers[used:]
        return found

    @property
    def paces(self) -> list[float]:
        """The pace of each rank (`core_speed.pace`)."""
        return [rank.pace for rank in self._ranks]

    def loads(self, asked: Sequence[int | str]) -> list[tuple[str, float]]:
        """Return each rank's machine, and the part of its cores that the rank's threads use; `asked` is the job's.

        Containers of one machine have names of their own, but share its cores.
        """
        machines, nodes = dict[str, list[Cores]](), dict[tuple[str, str], list[Cores]]()
        for rank in self._ranks:
            machines.setdefault(rank.machine, []).append(rank.cores)
            nodes.setdefault(rank.node, []).append(rank.cores)
        found = []
        for rank, count in zip(self._ranks, asked, strict=True):
            here = nodes[rank.node]
            threads: float = threads_per_rank(count, node_cores(here), len(here), rank.environ)
            if rank.cores.quota:  # is this rank's however little others compute
                threads = min(threads, rank.cores.quota)
            found.append((rank.machine, threads / node_cores(machines[rank.machine])))
        return found

    @property
    def places(self) -> list[str]:
        """Each rank's host, with the cores that it may use there, in words."""
        return [
            f"{rank.host}: {count_of(len(rank.cores.affinity), 'core')}, quota {rank.cores.quota:g}"
            for rank in self._ranks
        ]

    @property
    def numbers(self) -> list[int]:
        """The number of each rank's machine, in the order of their first ranks."""
        order = list(dict.fromkeys(rank.node for rank in self._ranks))
        return [order.index(rank.node) for rank in self._ranks]

    @property
    def clocks(self) -> list[str]:
        """Sentences for the user about hosts whose clocks differ from that of rank 0."""
        first, said = self._ranks[0], dict[str, str]()
        for rank in self._ranks:
            if abs(ahead := rank.clock - first.clock) > CLOCKS:
                said[rank.host] = (
                    f"The clock of {rank.host} is {abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} "
                    f"that of {first.host}: answers do not depend on it, but times in logs and traces do. Set it "
                    "(timedatectl set-ntp true)."
                )
        return list(said.values())

    @property
    def bindings(self) -> list[str]:
        """Sentences for the user about hosts on which mpiexec left cores without a rank."""
        hosts: dict[str, list[Cores]] = {}
        for rank in self._ranks:
            hosts.setdefault(rank.host, []).append(rank.cores)
        said: dict[str, list[str]] = {}
        for host, ranks in hosts.items():
            said.setdefault(binding(ranks), []).append(host)
        return [f"On {some_of(names, 'host')}, {text}" for text, names in said.items() if text]


def _boot_id() -> str:
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
