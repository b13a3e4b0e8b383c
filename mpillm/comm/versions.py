"""Check that all ranks run the same version of mpillm: others fail later, in ways that do not name the cause."""

from __future__ import annotations

from mpillm.comm.world import World
from mpillm.errors import JobError


def check(world: World) -> None:
    """Raise the same JobError on every rank if not all of them run the same version."""
    first = world.versions[0]
    for rank, version in enumerate(world.versions):
        if version != first:
            raise JobError(
                f"Rank {rank} on {world.hosts[rank]} runs mpillm {version}, and rank 0 on {world.hosts[0]} {first}; "
                "install the same version on every host."
            )
