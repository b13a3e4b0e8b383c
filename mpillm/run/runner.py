"""A job from its file to its results, as a state machine on every rank.

    Starting -> Leading -> Gathering -> Writing -> Ended       on rank 0
    Starting -> Following -> Waiting -> Ended                  on all others

Where MPI can go on without lost ranks, a loss in any state leads to Regrouping. If rank 0 has computed everything, it
goes on to write, and the others wait for that. Else all are Restarting: they lay the model out anew over the ranks that
are left. If rank 0 is lost, another rank becomes rank 0, and finds in the journal what is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mpillm.comm.faults import RankLost
from mpillm.comm.world import World
from mpillm.engine.engine import follow
from mpillm.engine.limits import Totals
from mpillm.errors import Interrupted, MpillmError
from mpillm.partition.replicas import Replicas
from mpillm.planning.wire import with_wire
from mpillm.run import outcome
from mpillm.run.computation import Computation
from mpillm.run.dispatch import Assistant
from mpillm.run.job import open_job, results_differ
from mpillm.run.opened import model_of, model_path
from mpillm.run.progress import Progress
from mpillm.run.session import Origin, Session
from mpillm.run.tracer import Tracer
from mpillm.spec import Spec
from mpillm.store import inputs, report
from mpillm.store.journal_facts import began, first_layout
from mpillm.store.output import PATIENCE, Claim

log = logging.getLogger(__name__)

TAKEOVER = 15.0  # seconds in which the lock of a lost rank 0 must be gone


@dataclass(frozen=True)
class Loss:
    """Ranks that were lost together, and time.monotonic() when this rank noticed."""

    ranks: tuple[str, ...]
    noticed: float


Losses = tuple[Loss, ...]  # since the run began; on rank 0 those that it has not told of yet


def run(world: World, spec: Spec, progress: Progress, trace: Path | None = None) -> report.Report | None:
    """Run a job on all ranks (collective); rank 0 gets the report, the others None. MpillmError says what is wrong.

    A run that comes to its end leaves a trace in the file `trace`.
    """
    with ExitStack() as stack:
        tracer = stack.enter_context(Tracer.started(world, trace)) if trace else None
        rank = _RankContext(world, spec, progress, stack, tracer)
        state: State | Regrouping | Ended = Starting(())
        while True:
            try:
                with world.losses():
                    while not isinstance(state, Ended):
                        state = state.advance(rank)
                    return state.report
            except RankLost:
                noticed = time.monotonic()
            # Not in the except block: there the error still refers to what the state had in memory.
            lost = world.shrink(3 * rank.longest_step)
            log.info("%s lost %s; agreed after %.3f s", world, ", ".join(lost), time.monotonic() - noticed)
            loss = Loss(tuple(lost), noticed)
            assert not isinstance(state, Ended)
            if isinstance(state, Regrouping):
                state = Regrouping(state.before, (*state.losses, loss))
            else:
                state = Regrouping(state, (loss,))


class _RankContext:
    """What a rank has in every state."""

    def __init__(
        self, world: World, spec: Spec, progress: Progress, stack: ExitStack, tracer: Tracer | None
    ) -> None:
        """What must be closed at the end goes to `stack`."""
        self.world, self.spec, self.progress, self.stack = world, spec, progress, stack
        self.tracer = tracer
        self.start = time.monotonic()
        self.longest_step = 0.0  # seconds

    @cached_property
    def claim(self) -> Claim:
        """The output directory, claimed for this run when it is first asked for, on rank 0."""
        patience = TAKEOVER if self.world.lost else PATIENCE
        return self.stack.enter_context(Claim(self.spec.output_path, patience))

    def begin(
        self,
        losses: Losses,
        origin: Origin | None = None,
        laid_out: Replicas | None = None,
        before: Computation | None = None,
    ) -> State:
        """Lay the model out, and open or continue the job on rank 0: the next state (collective).

        After a loss, `origin` is what the run began with, `laid_out` has the replicas of the ranks that are left, and
        `before` is the computation of this rank that the loss has interrupted, if any.
        """
        world = self.world
        with ExitStack() as unless_begun, _explaining(losses):
            with world.together():
                if world.rank == 0:
                    inputs.prepare(self.spec, self.claim)
            path = model_path(world, self.spec, self.progress)
            spec, shards = self._kept(origin)
            session = Session(world, spec, path, origin, laid_out, shards, replicated=True)
            unless_begun.callback(session.close)
            computation = None
            with world.together():
                if world.rank == 0:
                    computation = self._computation(session, path, before)
            assistant = self._assistant(session, path)
            if computation is not None and losses:
                computation.job.warn(_what_was_lost(losses, session))
            unless_begun.pop_all()
        return Leading(computation) if computation is not None else Following(session, assistant, losses)

    def _assistant(self, session: Session, path: Path) -> Assistant | None:
        """What the leaders of other replicas than rank 0's compute with (collective)."""
        if len(session.replicas) == 1:
            return None
        since = self.world.on_rank_0(lambda: began(self.claim))
        with self.world.together():
            if session.place.rank == 0 and self.world.rank > 0:
                return Assistant(session, self.spec, model_of(session, path, lambda: since))
        return None

    def _computation(self, session: Session, path: Path, before: Computation | None) -> Computation:
        if before is not None:
            computation = before.continued(session)
        else:
            job, journal = open_job(session, self.spec, path, self.claim, self.progress)
            computation = Computation(job, session, journal, Totals())
            job.phases.end("prepare")
        self.stack.callback(computation.close)
        return computation

    def _kept(self, origin: Origin | None) -> tuple[Spec, int | None]:
        """The job with the wire between shards that the run began with, and their number if results depend on it.

        Collective.
        """
        spec = self.spec
        if spec.wire.activations == "f32":
            return spec, None
        first = origin.layout if origin else self.world.on_rank_0(lambda: first_layout(self.claim))
        if first is None:
            return spec, None
        if spec.wire.activations == "auto":
            spec = with_wire(spec, first.wire)
        return spec, first.shards if spec.wire.activations != "f32" else None

    @contextmanager
    def computing(self, session: Session) -> Iterator[None]:
        """Let the session compute in the block, and close it at the end."""
        with closing(session), self.world.computing():
            try:
                yield
            finally:
                self.longest_step = session.worker.longest


# The states. Each has all data that it needs, and `advance`, which does what belongs to it and returns the next state.
# `regrouped` returns the next state after a loss; `computed` says whether rank 0 has computed everything.


@dataclass(frozen=True)
class Starting:
    """No session was made yet."""

    losses: Losses

    def advance(self, rank: _RankContext) -> State:
        return rank.begin(self.losses)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        assert not computed
        return Starting(self.losses + losses)


@dataclass(frozen=True)
class Restarting:
    """Ranks were lost: the model is laid out over those that are left; the processes of spare ranks end."""

    origin: Origin
    before: Computation | None  # None on a rank that has not led
    losses: Losses

    def advance(self, rank: _RankContext) -> State:
        laid_out = self.origin.laid_out(rank.world, rank.spec.wire)
        if not rank.world.keep_first(laid_out[-1].ranks.stop):
            rank.world.exit(0)
        return rank.begin(self.losses, self.origin, laid_out, self.before)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        assert not computed
        return Restarting(self.origin, self.before, self.losses + losses)


@dataclass(frozen=True)
class Leading:
    """Rank 0 computes, and the others follow it."""

    computation: Computation

    def advance(self, rank: _RankContext) -> State:
        session = self.computation.session
        with rank.computing(session):
            self.computation.run()
            return Gathering(self.computation, session.statistics())

    def regrouped(self, computed: bool, losses: Losses) -> State:
        return Restarting(self.computation.session.origin, self.computation, losses)


@dataclass(frozen=True)
class Gathering:
    """Everything is computed: rank 0 gathers the statistics of all ranks."""

    computation: Computation
    own: report.RankStatistics

    def advance(self, rank: _RankContext) -> State:
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

    def advance(self, rank: _RankContext) -> Ended:
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
    assistant: Assistant | None  # of a leader
    losses: Losses

    def advance(self, rank: _RankContext) -> State | Ended:
        session = self.session
        with rank.computing(session):
            if (self.assistant.run() if self.assistant else self._follow()) != 0:
                return Ended(None)
            with rank.world.together():
                session.watch.check_all()
            rank.world.gather(session.statistics())
            if rank.tracer:
                rank.tracer.gather()
            return Waiting(session.origin, self.losses)

    def _follow(self) -> int:
        return follow(self.session.worker, self.session.channel, self.session.watch.check)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        return Waiting(self.session.origin, self.losses).regrouped(computed, losses)


@dataclass(frozen=True)
class Waiting:
    """This rank has computed everything, and waits until rank 0 has written."""

    origin: Origin
    losses: Losses

    def advance(self, rank: _RankContext) -> Ended:
        with rank.world.together():
            pass
        return Ended(None)

    def regrouped(self, computed: bool, losses: Losses) -> State:
        losses = self.losses + losses
        return Waiting(self.origin, losses) if computed else Restarting(self.origin, None, losses)


@dataclass(frozen=True)
class Regrouping:
    """Ranks were lost in the state `before`: those that are left agree on how to go on."""

    before: State
    losses: Losses

    def advance(self, rank: _RankContext) -> State:
        computed = rank.world.bcast(isinstance(self.before, (Gathering, Writing)))
        return self.before.regrouped(computed, self.losses)


@dataclass(frozen=True)
class Ended:
    """The run is over; rank 0 has the report, unless the run was interrupted."""

    report: report.Report | None


State = Starting | Restarting | Leading | Gathering | Writing | Following | Waiting


@contextmanager
def _explaining(losses: Losses) -> Iterator[None]:
    """What fails after a loss, but would not without it, interrupts the run: the same command goes on."""
    try:
        yield
    except Interrupted:
        raise
    except MpillmError as error:
        if not losses:
            raise
        raise Interrupted(
            f"After the loss of {_lost_ranks(losses)} the others cannot go on: {error} "
            "The same command goes on from here."
        ) from error


def _what_was_lost(losses: Losses, session: Session) -> str:
    now, before = session.layout, session.origin.layout
    seconds = time.monotonic() - losses[-1].noticed
    replicas = f"{len(session.replicas)} replicas of " if len(session.replicas) > 1 else ""
    line = f"Lost {_lost_ranks(losses)}; the others went on after {seconds:.1f} s, as {replicas}{now}."
    if results_differ(now, before, session.spec.wire):
        line += (
            f" What is computed from here on may differ in its last digits from what {before} would have given "
            "([wire] f32 would not)."
        )
    return line


def _lost_ranks(losses: Losses) -> str:
    return ", ".join(name for loss in losses for name in loss.ranks)
