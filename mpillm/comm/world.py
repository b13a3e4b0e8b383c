"""The world of all ranks: how they agree, wait for each other, go on without lost ranks, and end together.

`program.guard` starts it and runs a program in it. This module needs mpi4py only once there is a world.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

import numpy as np
from threadpoolctl import threadpool_limits

from mpillm.comm import cores, deadline, ending, faults, heartbeat
from mpillm.comm.faults import RankLost
from mpillm.comm.meeting import Meeting
from mpillm.comm.nodes import Nodes, Rank
from mpillm.comm.waiting import wait
from mpillm.errors import Interrupted, MpillmError, out_of

if TYPE_CHECKING:
    from mpi4py import MPI

log = logging.getLogger(__name__)
T = TypeVar("T")

CRASHED = 70  # exit code of an error nobody foresaw (EX_SOFTWARE of sysexits.h)
GRACE = 2.0  # seconds in which the other ranks must fail alike or finish, before one rank's error aborts all


class World:
    """All ranks of this run. Collective methods must be called by every rank, in the same order."""

    def __init__(self, comm: MPI.Intracomm, meeting: Meeting | None = None) -> None:
        """`meeting` watches over the start until the ranks can hear each other."""
        self._meeting = meeting
        #: whether the others can go on when a rank dies (see `faults`)
        self.survives = comm.Get_size() > 1 and faults.survivable(os.environ)
        self.lost = 0  # ranks that have died so far
        self._outliving: list[object] = []
        self._heartbeat: heartbeat.Heartbeat | None = None
        self._join(comm)

    def _join(self, comm: MPI.Intracomm) -> None:
        """Become the world of these ranks."""
        self.comm = comm  # for messages between ranks; start-up and the end have communicators of their own
        self._startup, self._leaving = comm.Dup(), comm.Dup()
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        ranks = self.gather(Rank.of_this_process())
        self.nodes = Nodes(self.rank, ranks)
        self.hosts: tuple[str, ...] = tuple(rank.host for rank in ranks)
        self.host = self.hosts[self.rank]
        self._neighbours = faults.Neighbours(ranks[self.rank].process, self.nodes.neighbours)
        self.oversubscribed = self.nodes.ranks_here > self.nodes.cores_here

    def __str__(self) -> str:
        """This rank, as log lines name it."""
        return f"[{self.rank}@{self.host}]"

    def limit_threads(self, asked: int | str = "auto") -> int:
        """Return the threads this rank computes with, and hold the math libraries of NumPy to it.

        Call it before the compiled kernels are imported: it also sets OpenMP's variables, which are read only then.
        """
        threads = cores.threads_per_rank(asked, self.nodes.cores_here, self.nodes.ranks_here, os.environ)
        self.oversubscribed = self.nodes.ranks_here * threads > self.nodes.cores_here
        if threads > 1 and not cores.configure_openmp(self.oversubscribed):
            log.debug("%s the kernels were loaded before OpenMP's variables were set", self)
        threadpool_limits(threads)
        return threads

    def wait(self, done: Callable[[], object]) -> float:
        """Call `done` until it is true, with pauses that suit this node; return the seconds that took."""
        return wait(done, self.oversubscribed, self._look if self.survives else None)

    def _look(self) -> None:
        """Where MPI has not said so to this rank: another one knows that a rank is lost, or its heart has stopped."""
        if self.comm.Is_revoked() or (self._heartbeat is not None and self._heartbeat.lost):
            raise RankLost

    # Python objects, for start-up only: collective, slow, and of any type that pickles.

    def barrier(self) -> None:
        self.wait(self._startup.Ibarrier().Test)

    def bcast(self, value: T, root: int = 0) -> T:
        """Return the root's value on every rank."""
        self.barrier()  # so that nobody spins in MPI while the root still works
        received: T = self._startup.bcast(value, root)
        return received

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank."""
        wait(self._startup.Ibarrier().Test, crowded=True, look=self._look if self.survives else None)
        return self._startup.allgather(value)

    def agree(self, error: MpillmError | None) -> None:
        """Raise on every rank the error of the lowest rank that has one, so that all end alike."""
        failed = [(rank, found) for rank, found in enumerate(self.gather(error)) if found is not None]
        if failed:
            rank, first = failed[0]
            # Where rank 0 did not have it, the trouble is with that machine.
            where = f" (on rank {rank} of {self.size}, host {self.hosts[rank]})" if rank else ""
            raise type(first)(f"{first}{where}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Every rank tries the block; if it failed on any, it fails on all (see `agree`)."""
        error = None
        try:
            yield
        except MpillmError as found:
            error = found
        self.agree(error)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """In the block a rank that hangs (see `stillness`) is ended after the deadline."""
        beating = self._heartbeat
        if beating is not None:
            beating.computing = True
        try:
            yield
        finally:
            if beating is not None:
                beating.computing = False

    # Lost ranks.

    def is_loss(self, error: BaseException) -> bool:
        """Whether this error of a message means that a rank was lost, and the others can go on."""
        return self.survives and faults.is_loss(error, self.comm)

    @contextmanager
    def losses(self) -> Iterator[None]:
        """In the block, whatever MPI says when a rank is lost becomes RankLost."""
        try:
            yield
        except Exception as error:
            if not self.is_loss(error):
                raise
            raise RankLost from None

    def outlives(self, under_way: object) -> None:
        """Keep messages (with their buffers) as long as MPI may still look at them: when a rank is lost, for good."""
        self._outliving.append(under_way)

    def continue_with(self, ranks: int) -> None:
        """Go on as the first `ranks` ranks; for the others there is nothing to do, and their processes end here."""
        if ranks == self.size:
            return
        with faults.bounded(self._heartbeat.limit if self._heartbeat else 0.0, str(self)):
            comm = self.comm.Split(int(self.rank >= ranks))
            if self.rank >= ranks:
                self._exit(0)
            self._rejoin(comm)

    def shrink(self, busy: float = 0.0) -> list[str]:
        """After RankLost, on every rank that is left: become the world of these ranks, in the same order.

        All messages of before are gone. Returns who was lost. Others may compute for `busy` seconds more before
        they notice. Ends this process if they do not do the same then, or cannot: the same command goes on.
        """
        before, hosts = self.comm.Get_group(), self.hosts
        with faults.bounded(self._heartbeat.limit + busy if self._heartbeat else 0.0, str(self)):
            while True:
                for comm in (self.comm, self._startup, self._leaving):
                    comm.Revoke()  # whoever still waits for messages hears of it
                with contextlib.suppress(RankLost), self.losses():  # one more may be lost meanwhile
                    self._rejoin(self.comm.Shrink())
                    break
        left = self.comm.Get_group()
        at = left.Translate_ranks(None, before)
        gone = [rank for rank in range(before.Get_size()) if rank not in at]
        self.lost += len(gone)
        return [f"rank {rank} on {hosts[rank]}" for rank in gone]

    def _rejoin(self, comm: MPI.Comm) -> None:
        previous, self._heartbeat = self._heartbeat, None
        if previous is not None:  # it knows the ranks of the former world
            previous.stop()
        self._join(cast("MPI.Intracomm", comm))
        self._heartbeat = self._start_heartbeat()

    # The end.

    def abort(self, message: str, code: int) -> NoReturn:
        """Say `[rank@host] message` on stderr and end all ranks now; `code` becomes mpiexec's exit code."""
        sys.stdout.flush()
        say(f"{self} {message}")
        if self.size > 1:
            self.comm.Abort(code)
        os._exit(code)

    def run(self, program: Callable[[World], int]) -> int:
        """Run the program on this rank and end MPI; return the exit code that all ranks share.

        An MpillmError that all ranks raise is said once; one that the others do not share ends them after GRACE.
        Anything else is a bug: its last line is said and all ranks are aborted at once.
        """
        code, error = 0, None
        with _interruptible():
            try:
                self.meet()
                self.limit_threads()
                code = program(self)
            except MpillmError as found:
                error = found
            except SystemExit as found:
                code = found.code if isinstance(found.code, int) else int(found.code is not None)
            except BaseException as bug:
                if self.is_loss(bug):
                    self.abort("A rank was lost; the same command goes on from here.", Interrupted.exit_code)
                log.debug("%s", "".join(traceback.format_exception(bug)))
                if (missing := out_of(bug)) is None:
                    self.abort(_in_a_line(bug), CRASHED)
                error = Interrupted(missing)
            return self._leave(code, error)

    def meet(self) -> None:
        """Let the ranks hear each other from here on (see `heartbeat`); the start is over then."""
        try:
            self._heartbeat = self._start_heartbeat()
        finally:
            if self._meeting is not None:
                self._meeting.over()

    def part(self) -> None:
        """End the heartbeats: this rank needs the others no more."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None

    def _start_heartbeat(self) -> heartbeat.Heartbeat | None:
        """Start heartbeats; from here on a silent rank ends the world (see `heartbeat`)."""
        listener = rendezvous = None
        with self.together():
            if self.rank == 0 and self.size > 1 and (seconds := deadline.limit(os.environ)):
                listener, rendezvous = heartbeat.listen(seconds)
        shared, beating = self.bcast(rendezvous), None
        if shared is not None:
            beating = heartbeat.Heartbeat(
                self.rank,
                self.hosts,
                shared,
                listener,
                self.nodes.with_rank_0,
                self._neighbours.look if self.survives else None,
            )
        try:
            self.barrier()  # all ranks are connected now
        except BaseException:
            if beating is not None:
                beating.stop()
            raise
        return beating

    def _leave(self, code: int, error: MpillmError | None) -> int:
        mine = np.array([error.exit_code if error else code, error is not None], np.int32)
        all_ranks = np.empty((self.size, 2), np.int32)
        try:
            with self.losses():
                arrival = self._leaving.Iallgather(mine, all_ranks)
                try:
                    arrived = self._all_arrive(arrival, error)
                except Interrupted as signalled:
                    error = error or signalled
                    arrived = self._all_arrive(arrival, error)
        except RankLost:  # too late to matter: what this rank had to do is done, or has failed
            if error:
                say(f"{self} {error}" if self.rank else f"mpillm: {error}")
            self._exit(error.exit_code if error else code)
        if error and not arrived:
            self.abort(str(error), error.exit_code)
        failed = np.flatnonzero(all_ranks[:, 1])
        if error and self.rank == failed[0]:
            say(f"{self} {error}" if self.rank else f"mpillm: {error}")
        final = int(all_ranks[failed[0], 0] if len(failed) else all_ranks[:, 0].max())
        if self.lost:
            self._exit(final)  # MPI_Finalize may wait for the dead
        self._end(final, orderly=not len(failed))
        return final

    def _exit(self, code: int) -> NoReturn:
        """End this process, and MPI as it is."""
        if self._heartbeat:
            self._heartbeat.stop()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _all_arrive(self, arrival: MPI.Request, error: MpillmError | None) -> bool:
        """Wait for the other ranks to leave as well; after an error, no longer than GRACE."""
        until = time.monotonic() + GRACE if error else float("inf")
        arrived = False

        def done() -> bool:
            nonlocal arrived
            arrived = arrival.Test()
            return arrived or time.monotonic() > until

        self.wait(done)
        return arrived

    def _end(self, code: int, orderly: bool) -> None:
        """End this world; MPI itself ends with the process, so that another world may follow."""
        sys.stdout.flush()
        limit = self._heartbeat.limit if self._heartbeat else 0.0
        self.part()
        if self.size > 1:
            ending.world_ended(code, orderly, limit)
        if orderly:
            for comm in (self.comm, self._startup, self._leaving):
                comm.Free()


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) raise Interrupted, once: who sends them tends to send several."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        for name in caught:
            signal.signal(name, signal.SIG_IGN)
        raise Interrupted(f"Stopped by {signal.Signals(number).name}; the same command goes on from here.")

    caught: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(name, interrupt) for name in caught]
    try:
        yield
    finally:
        for name, handler in zip(caught, before, strict=True):
            signal.signal(name, handler)


def _in_a_line(bug: BaseException) -> str:
    """`Error: message (file.py:12 in function)`: what a user can put into a report."""
    what = traceback.format_exception_only(bug)[-1].strip()
    frames = traceback.extract_tb(bug.__traceback__)
    if not frames:
        return what
    at = frames[-1]
    return (
        f"{what} ({os.path.basename(at.filename)}:{at.lineno} in {at.name}; mpillm has a bug, or MPI failed)"
    )


def say(line: str) -> None:
    """One write, so that the lines of several ranks do not mix."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
