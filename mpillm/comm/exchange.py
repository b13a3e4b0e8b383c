"""Python objects between all ranks, for the start and for rare moments: slow, and of any type that pickles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mpillm.comm import faults
from mpillm.comm.waiting import wait
from mpillm.errors import MpillmError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


class Exchange:
    """What a world's ranks tell each other. A world has these attributes, and says how it waits."""

    rank: int
    size: int
    hosts: tuple[str, ...]  # of each rank
    survives: bool  # whether the others go on when a rank dies
    _startup: MPI.Intracomm

    def wait(self, done: Callable[[], object]) -> float:
        """Call `done` until it is true; return the seconds that took."""
        raise NotImplementedError

    def check_losses(self) -> None:
        """RankLost if another rank has noticed a loss, or a heartbeat has stopped, before MPI reports it here."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.wait(self._startup.Ibarrier().Test)

    def bcast(self, value: T, root: int = 0) -> T:
        """Return the root's value on every rank."""
        self.barrier()  # so that no rank spins in MPI while the root still works
        received: T = self._exchanged(lambda: self._startup.bcast(value, root))
        return received

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""
        wait(self._startup.Ibarrier().Test, crowded=True, look=self.check_losses if self.survives else None)
        received: list[T] = self._exchanged(lambda: self._startup.allgather(value))
        return received

    def _exchanged(self, exchange: Callable[[], Any]) -> Any:
        """What an exchange returns. RankLost if it received what no rank sent.

        Open MPI 5 with ULFM may report success for a collective in which a rank was killed and leave the buffer
        unfilled, which then cannot be unpickled.
        """
        from mpi4py import MPI

        try:
            return exchange()
        except MPI.Exception:
            raise
        except Exception as error:
            if self.survives and faults.known(self._startup):
                raise faults.RankLost from error
            raise

    def agree(self, error: MpillmError | None) -> None:
        """Raise the error of the lowest rank that has one on every rank."""
        failed = [(rank, found) for rank, found in enumerate(self.gather(error)) if found is not None]
        if failed:
            rank, first = failed[0]
            # Rank 0 does not have it, so the cause is that machine.
            where = f" (on rank {rank} of {self.size}, host {self.hosts[rank]})" if rank else ""
            raise type(first)(f"{first}{where}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on every rank; an MpillmError on any rank is raised on all (see `agree`)."""
        error = None
        try:
            yield
        except MpillmError as found:
            error = found
        self.agree(error)

    def on_rank_0(self, make: Callable[[], T]) -> T:
        """Return on every rank what rank 0 makes; an MpillmError there is raised on all."""
        made = None
        with self.together():
            if self.rank == 0:
                made = make()
        return cast("T", self.bcast(made))
