"""The world of all ranks: how they agree, wait for each other, and go on without lost ranks.

`program.start` makes it, and `running.run` runs a program in it. This module needs mpi4py only once there is a world.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, cast

from mpillm.comm import cores, deadline, ending, faults, heartbeat
from mpillm.comm.departure import Departure
from mpillm.comm.exchange import Exchange
from mpillm.comm.faults import RankLost
from mpillm.comm.meeting import Meeting
from mpillm.comm.nodes import Nodes, RankInfo
from mpillm.comm.rendezvous import listen
from mpillm.comm.team import Team
from mpillm.comm.waiting import wait, wait_for_flags

if TYPE_CHECKING:
    from mpi4py import MPI

STAND_BY = 0.02  # seconds between two looks of a spare rank
UNUSED_TAG = 1  # that no message has (see `transfer.Tag`)


class World(Exchange):
    """All ranks of this run. Collective methods must be called by every rank, in the same order."""

    def __init__(self, comm: MPI.Intracomm, meeting: Meeting | None = None) -> None:
        """`meeting` watches for ranks that do not start; after the start the heartbeat watches them."""
        self._meeting = meeting
        #: this rank's number and the number of ranks when the run was started, as in a file of hosts
        self.number, self.started = comm.Get_rank(), comm.Get_size()
        #: whether the others can go on when a rank dies (see `faults`)
        self.survives = comm.Get_size() > 1 and faults.survivable(os.environ)
        self.lost = 0  # number of ranks that were lost so far
        self._kept: list[object] = []
        self._heartbeat: heartbeat.Heartbeat | None = None
        self._join(comm)

    def _join(self, comm: MPI.Intracomm) -> None:
        """Use these ranks from now on, none of which is spare."""
        self.spare = False  # whether this rank was left out (see `go_on_with`)
        self._all, self._comms = comm, [comm]  # the communicator of all ranks, and all communicators in use
        self._departure: Departure | None = None
        self._ending = comm.Dup()
        self._comms.append(self._ending)
        self._use(comm)
        self._hosts_of_all = self.hosts
        self._neighbours = faults.Neighbours(self._ranks[self.rank].process, self.nodes.neighbours)

    def _use(self, comm: MPI.Intracomm) -> None:
        """Work with these ranks, which are all or those that are not spare."""
        self.comm = comm  # the communicator of messages; start-up and the end have their own
        self._startup = comm.Dup()
        self._comms += [self._startup, *([comm] if comm is not self._all else [])]
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.look_around()

    def look_around(self) -> None:
        """Find out where the ranks are, and how much memory is free there now (collective)."""
        told = self.gather((self.number, RankInfo.of_this_process()))
        #: the ranks' numbers when the run was started; some may have been lost
        self.numbers = tuple(number for number, _ in told)
        self._ranks = ranks = [rank for _, rank in told]
        self.nodes = Nodes(self.rank, ranks)
        self.hosts: tuple[str, ...] = tuple(rank.host for rank in ranks)
        self.host = self.hosts[self.rank]
        self.versions = tuple(rank.version for rank in ranks)  # the version of mpillm on each rank
        self.oversubscribed = self.nodes.oversubscribed(1)

    def __str__(self) -> str:
        """This rank, as log lines name it."""
        return f"[{self.rank}@{self.host}]"

    def threads(self, asked: int | str = "auto") -> int:
        """Return the number of threads that this rank computes with, if the job asks for `asked`."""
        return cores.threads_per_rank(asked, self.nodes.cores_here, self.nodes.ranks_here, os.environ)

    def limit_threads(self, threads: int) -> None:
        """Limit this process to `threads` threads for computing, those of NumPy's math libraries included.

        Call it before the compiled kernels are imported: it also sets OpenMP's variables, which are read only then.
        """
        self.oversubscribed = self.nodes.oversubscribed(threads)
        cores.limit_threads(threads, self.oversubscribed)

    def wait(self, done: Callable[[], object]) -> float:
        """Call `done` until it is true, with pauses that suit this node; return the seconds that took."""
        return wait(done, self.oversubscribed, self.check_losses if self.survives else None)

    def wait_for_flags(self, arrived: Callable[[float, float], bool], ranks: Sequence[int]) -> float:
        """Wait for what `ranks` of this machine write to shared memory (`waiting.wait_for_flags`); return the seconds.

        Between the calls of `arrived` MPI moves on what is under way, and finds out whether one of the ranks is lost.
        MPICH does not do so if a probe finds a message at once, such as a reply that has come early: the ranks waited
        for ever for a step that was not yet sent.
        """

        def look() -> None:
            for rank in ranks:
                self.comm.Iprobe(rank, UNUSED_TAG)
            self.check_losses()

        return wait_for_flags(arrived, self.oversubscribed, look)

    def check_losses(self) -> None:
        """Raise RankLost if a loss is known, also of a spare rank, and the others can go on."""
        if not self.survives:
            return
        revoked = self._ending.Is_revoked() or self.comm.Is_revoked()
        if revoked or (self._heartbeat is not None and self._heartbeat.lost):
            raise RankLost

    @contextmanager
    def computing(self) -> Iterator[None]:
        """In the block, perhaps within another one, a rank that hangs (see `stillness`) is ended after the deadline."""
        beating = self._heartbeat
        if beating is None:
            yield
            return
        before, beating.computing = beating.computing, True
        try:
            yield
        finally:
            beating.computing = before

    # Lost ranks.

    def is_loss(self, error: BaseException) -> bool:
        """Return whether this error means that a rank was lost and the others can go on."""
        return self.survives and faults.is_loss(error, self.comm)

    @contextmanager
    def losses(self) -> Iterator[None]:
        """In the block, MPI's errors after the loss of a rank become RankLost."""
        try:
            yield
        except Exception as error:
            if not self.is_loss(error):
                raise
            raise RankLost from None

    def keep_alive(self, messages: object) -> None:
        """Keep messages and their buffers for good: after a loss, MPI may still access them."""
        self._kept.append(messages)

    def go_on_with(self, ranks: Collection[int]) -> bool:
        """Become the world of these ranks, in the same order (collective). Returns False on the others, the spare ones.

        A spare rank then stands by. After a loss spare ranks are part of the world again, behind the others.
        """
        if len(ranks) < self.size:
            self.spare = self.rank not in ranks
            with faults.bounded(self._heartbeat.limit if self._heartbeat else 0.0, str(self)):
                if not self.spare:  # the spare ones need not be asked
                    self._use(self._only(ranks))
        return not self.spare

    def team(self, ranks: range) -> Exchange:
        """Return an exchange among these ranks, of which this is one (collective for them alone)."""
        if len(ranks) == self.size:
            return self
        with faults.bounded(self._heartbeat.limit if self._heartbeat else 0.0, str(self)):
            comm = self._only(ranks)
        self._comms.append(comm)
        return Team(self, ranks, comm)

    def _only(self, ranks: Collection[int]) -> MPI.Intracomm:
        all_of_them = self.comm.Get_group()
        group = all_of_them.Incl(sorted(ranks))
        all_of_them.Free()
        comm = self.comm.Create_group(group)
        group.Free()
        return comm

    def stand_by(self) -> None:
        """Wait on a spare rank until all ranks leave. Raises RankLost if the others want it to help after a loss."""
        departure = self.depart(0, failed=False)
        while not departure.arrived():
            self.check_losses()
            time.sleep(STAND_BY)

    def depart(self, code: int, failed: bool) -> Departure:
        """This rank leaves with an exit code; `failed` says that an error is the reason. The first call counts."""
        if self._departure is None:
            self._departure = Departure(self._ending, code, failed)
            self.keep_alive(self._departure)
        return self._departure

    def shrink(self, busy: float = 0.0) -> list[str]:
        """After RankLost, on every rank that is left, spare ones too: become the world of these ranks.

        They keep their order, but spare ranks come last. Returns the names of the lost ranks. All earlier messages are
        gone. The others may compute for `busy` seconds before they notice; if they do not call this after that, this
        process ends, and the same command continues the run.
        """
        before, hosts, spare = self._all.Get_group(), self._hosts_of_all, self.spare
        with faults.bounded(self._heartbeat.limit + busy if self._heartbeat else 0.0, str(self)):
            while True:
                for comm in self._comms:
                    comm.Revoke()  # ends every wait for messages
                with contextlib.suppress(RankLost), self.losses():  # another rank may be lost meanwhile
                    left = self._all.Shrink()
                    self._rejoin(left.Split(0, left.Get_rank() + spare * left.Get_size()))
                    break
        now = self._all.Get_group()
        at = now.Translate_ranks(None, before)
        gone = [rank for rank in range(before.Get_size()) if rank not in at]
        for group in (before, now):
            group.Free()
        self.lost += len(gone)
        return [f"rank {rank} on {hosts[rank]}" for rank in gone]

    def _rejoin(self, comm: MPI.Comm) -> None:
        previous, self._heartbeat = self._heartbeat, None
        if previous is not None:  # it has the ranks of the former world
            previous.stop()
        self._join(cast("MPI.Intracomm", comm))
        self._heartbeat = self._new_heartbeat()

    # The end.

    def abort(self, message: str, code: int) -> NoReturn:
        """Write `[rank@host] message` to stderr, if there is one, and end all ranks at once with exit code `code`.

        Where ranks may be lost, the heartbeat ends the others: mpiexec of Open MPI 5 may hang there when several ranks
        call MPI_Abort.
        """
        sys.stdout.flush()
        if message:
            say(f"{self} {message}")
        if self.survives and self._heartbeat is not None:
            self._heartbeat.end_all(code)
        elif self._all.Get_size() > 1:
            self._all.Abort(code)
        os._exit(code)

    def start_heartbeat(self) -> None:
        """From here on a rank that falls silent ends the world (see `heartbeat`), and the meeting is over."""
        try:
            self._heartbeat = self._new_heartbeat()
        finally:
            self.all_arrived()

    def all_arrived(self) -> None:
        """Note that the start is over: all ranks are here."""
        if self._meeting is not None:
            self._meeting.over()
            self._meeting = None

    def stop_heartbeat(self) -> None:
        """Stop the heartbeat: this rank does not need the others any more."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None

    def _new_heartbeat(self) -> heartbeat.Heartbeat | None:
        """Return a running heartbeat of this world (collective); None if there is no deadline."""
        listener = rendezvous = None
        with self.together():
            if self.rank == 0 and self.size > 1 and (seconds := deadline.limit(os.environ)):
                listener, rendezvous = listen(seconds)
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

    def exit(self, code: int) -> NoReturn:
        """End this process at once, without ending MPI."""
        self.stop_heartbeat()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def end(self, code: int, orderly: bool) -> None:
        """End this world; MPI itself ends with the process, so that another world may follow.

        `orderly` says that no message is under way.
        """
        sys.stdout.flush()
        limit = self._heartbeat.limit if self._heartbeat else 0.0
        self.stop_heartbeat()
        if self._all.Get_size() > 1:
            ending.world_ended(code, orderly, limit)
        if orderly:
            for comm in self._comms:
                comm.Free()


def say(line: str) -> None:
    """Write a line to stderr in one write, so that the lines of several ranks do not mix."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
