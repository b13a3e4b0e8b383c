"""The ranks of one replica, which agree with each other while those of other replicas may still be on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mpillm.comm.exchange import Exchange

if TYPE_CHECKING:
    from mpi4py import MPI


class Team(Exchange):
    """Consecutive ranks of a world. `rank` counts from the first of them; errors name ranks as the world does."""

    def __init__(self, world: Exchange, ranks: range, comm: MPI.Intracomm) -> None:
        """`comm` has these ranks."""
        self._world, self._ranks, self._startup = world, ranks, comm
        self.rank, self.size = world.rank - ranks.start, len(ranks)
        self.hosts, self.survives = world.hosts[ranks.start : ranks.stop], world.survives

    def wait(self, done: Callable[[], object]) -> float:
        """See `Exchange`; this and the following are those of the world."""
        return self._world.wait(done)

    def check_losses(self) -> None:
        self._world.check_losses()

    def keep_alive(self, messages: object) -> None:
        self._world.keep_alive(messages)

    def where(self, rank: int) -> str:
        return self._world.where(self._ranks[rank])
