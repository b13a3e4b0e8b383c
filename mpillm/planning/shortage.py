"""Tell the user if the ranks of a host may take more memory than is free."""

from __future__ import annotations

from collections.abc import Iterable

from mpillm.planning.machines import Machines
from mpillm.planning.rank_plan import ReplicaPlan
from mpillm.spec import shown_bytes

STARTED = 45 * 2**20  # bytes of a rank (Python and MPI) before free memory is measured
SPARE = 1.1  # this factor on planned memory leaves space for mpiexec and the page cache (docs/memory.md)


def shortage(replicas: Iterable[ReplicaPlan], machines: Machines, in_slurm: bool) -> str | None:
    """Return a sentence on the host that lacks most memory, with what to type; None if every host has enough."""
    needed = [0] * len(machines.ranks_per_host)
    free = [STARTED * count for count in machines.ranks_per_host]
    plans = [rank for replica in replicas for rank in replica.ranks]
    for plan, host, left in zip(plans, machines.host_of_rank, machines.free, strict=True):
        needed[host] += plan.held
        free[host] += left
    host = max(range(len(needed)), key=lambda one: needed[one] - free[one])
    if needed[host] <= free[host]:
        return None
    ask = f"type sbatch --mem={int(SPARE * needed[host]) // 2**20 + 1}M ..., or " if in_slurm else ""
    return (
        f"{machines.host_names()[host]} has {shown_bytes(free[host])} for this run, which may take "
        f"{shown_bytes(needed[host])} there and be killed for it; {ask}lower memory.kv or memory.weights, or use "
        "more hosts."
    )
