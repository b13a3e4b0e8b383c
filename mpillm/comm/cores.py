"""Find how many cores a rank may use: its affinity, the control group's CPU quota, and the job system.

Threads are bound to no core of their own unless OMP_PROC_BIND says so: a rank's run where its launcher allows them
(mpiexec --bind-to, srun --cpu-bind), and the system moves them away from cores that others need.  Parts of a step go to
whichever thread is free.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from threadpoolctl import threadpool_limits

from mpillm.comm.launch import starter_folder
from mpillm.errors import JobError
from mpillm.words import count_of

log = logging.getLogger(__name__)

# Variables that say how many threads a rank has; the first one counts.
THREADS = ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK")
COMPILED_KERNELS = "mpillm.kernels._compiled"  # the module that loads OpenMP


@dataclass(frozen=True)
class Cores:
    """The cores of one process, and the tightest CPU quota above it (in cores, and where it is set).

    A core is known by its first hardware thread: products of integers gain nothing from a core's second one.
    """

    affinity: frozenset[int]
    quota: float = 0.0  # 0: none
    quota_at: str = ""
    launcher: frozenset[int] = frozenset()  # the cores of the mpiexec that started it; empty: none did

    @classmethod
    def of_this_process(cls) -> Cores:
        """Return the cores of this process, without second threads of a core."""
        root = Path("/")
        if not hasattr(os, "sched_getaffinity"):
            return cls(frozenset(range(os.cpu_count() or 1)))
        affinity = physical(os.sched_getaffinity(0), root)
        return cls(affinity, *cpu_quota(root), physical(_of_launcher(), root))


def physical(cpus: Iterable[int], root: Path) -> frozenset[int]:
    """Return the cores of these logical CPUs, each named by its first one."""
    return frozenset(_first_sibling(cpu, root) for cpu in cpus)


def _first_sibling(cpu: int, root: Path) -> int:
    about = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return min(int(first) for first in re.findall(r"(?:^|,)(\d+)", about.read_text()))
    except (OSError, ValueError):  # not told: then every one is a core
        return cpu


def _of_launcher() -> set[int]:
    try:
        return os.sched_getaffinity(os.getppid()) if starter_folder() else set()
    except OSError:
        return set()


def cpu_quota(root: Path) -> tuple[float, str]:
    """Return the tightest CPU quota on this process in cores, and its group's path; (0.0, "") if there is none.

    Reads control groups of version 2 (cpu.max) and 1 (cpu.cfs_quota_us) below `root`, for a process in a
    container too: there /proc names a group that is not below /sys/fs/cgroup, and the top one counts.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return 0.0, ""
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")
        found += [(_quota_of(at), str(at)) for at in (group, *group.parents) if at.is_relative_to(mount)]
    return min(((quota, where) for quota, where in found if quota > 0), default=(0.0, ""))


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return 0.0 if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return 0.0


def node_cores(ranks: list[Cores]) -> int:
    """Return the number of whole cores that the ranks of one node have together, at least 1."""
    return max(1, int(cores_of_time(ranks)))


def cores_of_time(ranks: list[Cores]) -> float:
    """Return the time that the ranks of one node may compute together, in cores: a quota may be less than one.

    Ranks bound to cores of their own count each of them; a quota that several share counts once.
    """
    cores: float = len(frozenset().union(*(rank.affinity for rank in ranks)))
    if all(rank.quota for rank in ranks):
        cores = min(cores, sum({rank.quota_at: rank.quota for rank in ranks}.values()))
    return cores


def with_cores(ranks: int, cores: int, one_thread: bool) -> int:
    """Return the number of a node's ranks that compute if the layout is automatic and cores are fewer than ranks.

    A power of two, for they may be shards: the one that leaves the fewest cores idle, and the larger of two such ones.
    With `one_thread` a rank has a thread, whatever cores are left.
    """
    if ranks <= cores:
        return ranks
    used = [1 << power for power in range(cores.bit_length())]
    return max(used, key=lambda count: (count if one_thread else cores // count * count, count))


def reserve_in_words(ranks: int, cores: int, used: int) -> str:
    """Return a clause about the ranks of a node that are kept in reserve."""
    surplus = ranks - used
    are, there = ("is" if count == 1 else "are" for count in (surplus, cores))
    return f"{surplus} of {ranks} ranks {are} kept in reserve, because there {there} only {count_of(cores, 'core')}"


def binding(ranks: list[Cores]) -> str:
    """Return a sentence if mpiexec, without being told to, has left cores of the node without a rank; else "".

    Open MPI binds each of up to two ranks to one core, and a rank's threads with it.
    """
    used, there = (
        frozenset().union(*sets)
        for sets in zip(*((rank.affinity, rank.launcher) for rank in ranks), strict=True)
    )
    if not used < there:
        return ""
    return (
        f"mpiexec bound the ranks to {len(used)} of {len(there)} cores; the others are idle. Add --bind-to none "
        "after mpiexec."
    )


def threads_per_rank(asked: int | str, cores: int, ranks: int, environ: Mapping[str, str]) -> int:
    """Return a rank's threads: the job's value, else OMP_NUM_THREADS, SLURM_CPUS_PER_TASK, or its share of the node."""
    if asked != "auto":
        return _positive("layout.threads", asked)
    for name in THREADS:
        # OMP_NUM_THREADS may list a number for each nested level
        value = environ.get(name, "").split(",")[0].strip()
        if value:
            return _positive(name, value)
    return max(1, cores // ranks)


def _positive(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise JobError(f"{name} = {value!r} is not a number of threads: give a whole number, at least 1.")
    return number


def limit_threads(threads: int, oversubscribed: bool) -> None:
    """Limit this process to `threads` threads, those of NumPy's math libraries included, and configure OpenMP."""
    if threads > 1 and not configure_openmp(oversubscribed):
        log.debug("the kernels were loaded before OpenMP's variables were set")
    threadpool_limits(threads)


def configure_openmp(oversubscribed: bool) -> bool:
    """Set the variables of OpenMP for this rank; return False if the kernels were loaded before and it is too late.

    libgomp reads them while it is loaded, with the compiled kernels, and core/run.c when it opens its first parallel
    region.  What the user has set stays.  Where the node has more threads than cores, idle threads sleep at once;
    elsewhere they look for work for about 200 microseconds (libgomp by itself: for milliseconds, in which the threads
    that read weights lack the core).
    """
    os.environ.setdefault("OMP_STACKSIZE", "4M")  # core/run.c: smaller than 1 MiB, and a thread cannot help
    if oversubscribed:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    elif "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    return COMPILED_KERNELS not in sys.modules
