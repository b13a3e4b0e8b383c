"""Let ranks leave together: each tells all others its exit code, and waits until all have done so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI


class Departure:
    """A rank's message to all that it leaves, with its exit code, and theirs."""

    def __init__(self, comm: MPI.Intracomm, code: int, failed: bool) -> None:
        self._own = np.array([code, failed], np.int32)
        self._all = np.empty((comm.Get_size(), 2), np.int32)
        self.rank = comm.Get_rank()  # among all ranks, spare ones too
        self._arrival = comm.Iallgather(self._own, self._all)

    def arrived(self) -> bool:
        """Return whether all ranks leave."""
        return self._arrival.Test()

    @property
    def failed(self) -> list[int]:
        """The ranks that an error ends, once all have arrived."""
        return [int(rank) for rank in np.flatnonzero(self._all[:, 1])]

    @property
    def code(self) -> int:
        """The exit code of all: that of the first rank with an error, or else the highest."""
        return int(self._all[self.failed[0] if self.failed else self._all[:, 0].argmax(), 0])
