"""The states of a run on every rank, and their transitions.

    Starting -> Leading -> Gathering -> Writing -> Ended       on rank 0
    Starting -> Following -> Waiting -> Ended                  on all others
    Starting -> StandingBy -> Ended                            on spare ranks

If MPI can continue without lost ranks, a loss in any state leads to Regrouping. If rank 0 has computed everything, it
continues with Writing, and the others wait for it. Else all go to Restarting: they distribute the model anew over the
remaining ranks. If rank 0 is lost, another rank becomes rank 0, and reads from the journal what is done.

Each state has all data that it needs, and two methods: `advance` does the work of the state and returns the next state;
`regrouped` returns the next state after a loss, where `computed` tells whether rank 0 has computed everything.
"""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from mpillm.comm.free_memory import give_back
from mpillm.comm.world import World
from mpillm.engine.worker import follow
from mpillm.planning.speed import Speed
from mpillm.run import outcome
from mpillm.run.assistant import Assistant
from mpillm.run.balance import AGAIN, Slowed, Teller, is_failure, what_was_slow
from mpillm.run.computation import Computation
from mpillm.run.context import RankContext
from mpillm.run.losses import Losses, explaining, what_was_lost
from mpillm.run.opened import found_here, model_path
from mpillm.run.origin import Origin
from mpillm.run.session import Session
from mpillm.run.statistics import rank_statistics
from mpillm.store import inputs, report
from mpillm.store.journal_facts import began


@dataclass(frozen=True)
class Starting:
    """No session exists yet."""

    def advance(self, rank: RankContext) -> State:
        return begin(rank)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        if computed:  # without this rank
            return Waiting(None, losses)
        return Restarting(None, None, losses)  # others may have begun already


@dataclass(frozen=True)
class Restarting:
    """The model is distributed anew: ranks were lost, and spare ones may replace them, or a rank has become slow."""

    origin: Origin | None  # None on a rank that was spare, or still starting
    before: Computation | None  # None on a rank that has not led
    losses: Losses
    slowed: Slowed | None = None  # known to rank 0
    speed: Speed | None = None  # the speed of a rank that was spare, if it is known

    def advance(self, rank: RankContext) -> State:
        world = rank.world
        # The earlier session's memory is released before the new one needs as much.
        gc.collect()
        give_back()
        if (origin := self._shared(world)) is None:
            return begin(rank, self.losses)
        if (slowed := world.bcast(self.slowed)) is not None:
            world.look_around()
            slower = origin.slower * slowed.ratios[world.rank]
            # The fastest rank has its measured speed, so a rank that was slow for a while regains its own.
            origin = replace(
                origin,
                speed=origin.speed or slowed.planned[world.rank],
                slower=slower / min(world.gather(slower)),
            )
        return begin(rank, self.losses, origin, self.before, slowed)

    def _shared(self, world: World) -> Origin | None:
        """Return the origin, which others learn from a rank that has computed; None if no such rank is left."""
        knowing = [rank for rank, knows in enumerate(world.gather(self.origin is not None)) if knows]
        if not knowing:
            return None
        own = self.origin and replace(self.origin, watch=None, speed=None, tokenizer=None, slower=1.0)
        shared = world.bcast(own, knowing[0])
        return self.origin or (shared and replace(shared, speed=self.speed))

    def regrouped(self, computed: bool, losses: Losses) -> State:
        losses = self.losses + losses
        if computed:  # without this rank
            return Waiting(self.origin, losses)
        return Restarting(self.origin, self.before, losses, speed=self.speed)


@dataclass(frozen=True)
class Leading:
    """Rank 0 computes, and the others follow it."""

    computation: Computation

    def advance(self, rank: RankContext) -> State:
        session = self.computation.session
        with rank.computing(session):
            if (slowed := self.computation.run(rank.computes_since)) is None:
                return Gathering(self.computation, rank_statistics(session))
        return self._again((), slowed)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        return self._again(losses)

    def _again(self, losses: Losses, slowed: Slowed | None = None) -> State:
        origin = self.computation.session.origin
        self.computation.let_go()
        return Restarting(origin, self.computation, losses, slowed)


@dataclass(frozen=True)
class Gathering:
    """Everything is computed: rank 0 gathers the statistics of all ranks."""

    computation: Computation
    own: report.RankStatistics

    def advance(self, rank: RankContext) -> State:
        with rank.world.computing():
            ranks = rank.world.gather(self.own)
            if rank.tracer:
                rank.tracer.gather()
            return self._writing(ranks)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        return self._writing([self.own])

    def _writing(self, ranks: list[report.RankStatistics]) -> State:
        self.computation.job.phases.end("compute")
        return Writing(self.computation, ranks)


@dataclass(frozen=True)
class Writing:
    """Rank 0 writes the results and the report."""

    computation: Computation
    ranks: list[report.RankStatistics]

    def advance(self, rank: RankContext) -> Ended:
        with rank.world.together():  # no rank leaves before everything is written
            made = outcome.write(self.computation, self.ranks, rank.start)
            if rank.tracer:
                rank.tracer.write()
        return Ended(made)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        return self


@dataclass(frozen=True)
class Following:
    """This rank computes the steps that its leader sends; if it leads a replica, the lines that rank 0 sends."""

    session: Session
    assistant: Assistant | None  # the leader's assistant; None on other ranks
    losses: Losses

    def advance(self, rank: RankContext) -> State | Ended:
        session = self.session
        with rank.computing(session):
            code = self.assistant.run() if self.assistant else self._follow()
            if code == AGAIN:
                return Restarting(session.origin, None, self.losses)
            if code != 0:
                return Ended(None)
            with rank.world.together():
                session.watch.check_all()
            rank.world.gather(rank_statistics(session))
            if rank.tracer:
                rank.tracer.gather()
            return Waiting(session.origin, self.losses)

    def _follow(self) -> int:
        session = self.session
        teller = Teller(session)

        def between() -> None:
            session.watch.check()
            teller.tell()

        code = follow(session.worker, session.channel, between)
        if not is_failure(code):
            teller.end()
        return code

    def regrouped(self, computed: bool, losses: Losses) -> State:
        return Waiting(self.session.origin, self.losses).regrouped(computed, losses)


@dataclass(frozen=True)
class Waiting:
    """This rank has computed everything, and waits until rank 0 has written the results."""

    origin: Origin | None  # None on a rank that was spare
    losses: Losses

    def advance(self, rank: RankContext) -> Ended:
        with rank.world.together():
            pass
        return Ended(None)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        losses = self.losses + losses
        return Waiting(self.origin, losses) if computed else Restarting(self.origin, None, losses)


@dataclass(frozen=True)
class StandingBy:
    """This rank is spare: it has not opened the model, and computes only if others are lost."""

    origin: Origin | None  # None if it has never computed
    speed: Speed | None  # the speed of this rank, if it is known
    losses: Losses

    def advance(self, rank: RankContext) -> Ended:
        rank.world.stand_by()
        return Ended(None)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        losses = self.losses + losses
        if computed:
            return Waiting(self.origin, losses)
        return Restarting(self.origin, None, losses, speed=self.speed)


@dataclass(frozen=True)
class Regrouping:
    """Ranks were lost in the state `before`: the remaining ranks agree on the next state."""

    before: State
    losses: Losses

    def advance(self, rank: RankContext) -> State:
        computed = rank.world.bcast(isinstance(self.before, (Gathering, Writing)))
        return self.before.regrouped(computed, self.losses)


@dataclass(frozen=True)
class Ended:
    """The run is over; rank 0 has the report, unless the run was interrupted."""

    report: report.Report | None


State = Starting | Restarting | Leading | Gathering | Writing | Following | Waiting | StandingBy


def begin(
    rank: RankContext,
    losses: Losses = (),
    origin: Origin | None = None,
    before: Computation | None = None,
    slowed: Slowed | None = None,
) -> State:
    """Distribute the model, open or continue the job on rank 0, and return the next state (collective).

    After a loss, `origin` is that of the run, and `before` the computation of this rank that the loss interrupted, if
    any. `slowed` tells why it was interrupted without a loss.
    """
    world, entered = rank.world, time.monotonic()
    with ExitStack() as unless_begun, explaining(losses):
        since = world.on_rank_0(partial(_prepare, rank))
        path = model_path(world, rank.spec, rank.progress)
        spec, shards = rank.kept(origin)
        say = rank.progress.say
        find = found_here(world, rank.spec, rank.progress)
        session = Session(
            world, spec, path, origin, shards, replicated=True, leave_out=True, say=say, find=find
        )
        unless_begun.callback(session.close)
        rank.computes_since = rank.computes_since or time.monotonic()
        if world.spare:
            return StandingBy(origin, session.speed, losses)
        computation = assistant = None
        with session.getting_ready():
            with session.team.together():
                if world.rank == 0:
                    if losses or rank.resumes:
                        session.arrivals.wait()
                    computation = rank.computation(session, path, before)
                else:
                    assistant = rank.assistant(session, path, since)
            if assistant is not None:
                session.arrivals.tell()
        if computation is not None and losses:
            computation.job.warn(what_was_lost(losses, session))
        if computation is not None and slowed is not None:
            computation.job.warn(what_was_slow(slowed, session, time.monotonic() - entered))
        unless_begun.pop_all()
    return Leading(computation) if computation is not None else Following(session, assistant, losses)


def _prepare(rank: RankContext) -> datetime:
    """Prepare the input; return when the run began. For rank 0, which does not wait for the others here."""
    inputs.prepare(rank.spec, rank.claim)
    return began(rank.claim)
