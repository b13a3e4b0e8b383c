"""Python objects between all ranks, for the start and for rare moments: slow, and of any type that pickles."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from mpillm.comm import faults
from mpillm.comm.waiting import wait
from mpillm.errors import MpillmError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")
U8 = npt.NDArray[np.uint8]

HEAD = 512  # bytes of an object that travel in the first message; most need no second one
LENGTH = 8  # bytes of the length that precedes an object


class Exchange:
    """The facts that the ranks of a world tell each other. A world has these attributes, and says how it waits."""

    rank: int
    size: int
    hosts: tuple[str, ...]  # the host of each rank
    survives: bool  # whether the others go on when a rank dies
    _startup: MPI.Intracomm

    def wait(self, done: Callable[[], object]) -> float:
        """Call `done` until it is true; return the seconds that took."""
        raise NotImplementedError

    def check_losses(self) -> None:
        """Raise RankLost if another rank has noticed a loss, or a heartbeat has stopped, before MPI reports it here."""
        raise NotImplementedError

    def keep_alive(self, messages: object) -> None:
        """Keep messages and their buffers for good."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.wait(self._startup.Ibarrier().Test)

    def bcast(self, value: T, root: int = 0) -> T:
        """Return the root's value on every rank; others may still be on their way to this call."""

        def exchange() -> T:
            own = self.rank == root
            head, data = _packed(value) if own else (np.zeros(HEAD, np.uint8), b"")
            self._finish(self._startup.Ibcast(head, root), head)
            size = _size(head)
            if size <= HEAD - LENGTH:
                return cast("T", _unpacked(head))
            rest = np.frombuffer(data, np.uint8) if own else np.zeros(size, np.uint8)
            self._finish(self._startup.Ibcast(rest, root), rest)
            return cast("T", pickle.loads(rest.data))

        return self._exchanged(exchange)

    def _post(self, value: object) -> None:
        """Send a value from rank 0 to the others, which receive it by `bcast`, in the background.

        `bcast` may wait on rank 0 too, in the same machine's memory for a rank that does not call MPI for a while.
        """
        head, data = _packed(value)
        rest = np.frombuffer(data, np.uint8)
        buffers = [head] if _size(head) <= HEAD - LENGTH else [head, rest]
        self.keep_alive([(self._startup.Ibcast(each, 0), each) for each in buffers])

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""

        def exchange() -> list[T]:
            head, data = _packed(value)
            heads = np.zeros((self.size, HEAD), np.uint8)
            self._finish(self._startup.Iallgather(head, heads), (head, heads))
            sizes = [_size(each) for each in heads]
            if max(sizes) <= HEAD - LENGTH:
                return [_unpacked(each) for each in heads]
            own, all_data = np.frombuffer(data, np.uint8), np.zeros(sum(sizes), np.uint8)
            self._finish(self._startup.Iallgatherv(own, (all_data, sizes)), (own, all_data))
            ends = list(itertools.accumulate(sizes))
            return [
                pickle.loads(all_data[end - size : end].data) for end, size in zip(ends, sizes, strict=True)
            ]

        return self._exchanged(exchange)

    def _finish(self, request: MPI.Request, buffers: object) -> None:
        """Wait for a collective call of MPI that does not block.

        In one that blocks, ranks would poll without a pause, and keep those that are late from their core.
        """
        look = self.check_losses if self.survives else None
        try:
            wait(request.Test, crowded=True, look=look)
        except BaseException:
            self.keep_alive((request, buffers))
            raise

    def _exchanged(self, exchange: Callable[[], T]) -> T:
        """Return the result of an exchange. Raises RankLost if it received something that no rank sent.

        Open MPI 5 with ULFM may report success for a collective in which a rank was killed and leave the buffer
        unfilled, which then cannot be unpickled.
        """
        from mpi4py import MPI

        try:
            return exchange()
        except (MPI.Exception, MpillmError, faults.RankLost):
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
            raise type(first)(f"{first}{self.where(rank)}")

    def where(self, rank: int) -> str:
        """Return what an error of this rank ends with. If rank 0 does not have it, the cause is that machine."""
        return f" (on rank {rank} of {self.size}, host {self.hosts[rank]})" if rank else ""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on every rank; an MpillmError on any rank is raised on all (see `agree`)."""
        error = None
        try:
            yield
        except MpillmError as found:
            error = found
        self.agree(error)

    @contextmanager
    def unless_rank_0_fails(self) -> Iterator[None]:
        """Run the block on every rank; an MpillmError on rank 0, which waits for no other, is raised on all."""
        try:
            yield
        except MpillmError as found:
            if self.rank == 0:
                self._post(found)
            raise
        if self.rank == 0:
            self._post(None)
        elif (error := self.bcast(cast("MpillmError | None", None))) is not None:
            raise error

    def on_rank_0(self, make: Callable[[], T]) -> T:
        """Return on every rank what rank 0 makes; an MpillmError there is raised on all."""
        made = error = None
        if self.rank == 0:
            try:
                made = make()
            except MpillmError as found:
                error = found
        made, error = self.bcast((made, error))
        if error is not None:
            raise error
        return cast("T", made)


def _packed(value: object) -> tuple[U8, bytes]:
    """Return a value's first message, uint8 [HEAD], and all of its bytes."""
    data, head = pickle.dumps(value, pickle.HIGHEST_PROTOCOL), np.zeros(HEAD, np.uint8)
    head[:LENGTH].view(np.uint64)[0] = len(data)
    begin = data[: HEAD - LENGTH]
    head[LENGTH : LENGTH + len(begin)] = np.frombuffer(begin, np.uint8)
    return head, data


def _size(head: U8) -> int:
    return int(head[:LENGTH].view(np.uint64)[0])


def _unpacked(head: U8) -> Any:
    return pickle.loads(head[LENGTH : LENGTH + _size(head)].data)
