"""The computation of a job's requests with one session, on rank 0, which appends all answers to the journal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import msgspec

from mpillm.engine.limits import Totals
from mpillm.errors import NOT_FINITE, MpillmError
from mpillm.planning.limits import cached_tokens, step_description
from mpillm.run.balance import AGAIN, Balance, Slowed, watched
from mpillm.run.dispatch import Dispatcher, added
from mpillm.run.dispatch_messages import AnswerRecord, Assigned, Unfinished
from mpillm.run.job import OpenedJob, open_journal, unanswered
from mpillm.run.leader import Given, Leader
from mpillm.run.progress import Bar, ProgressState
from mpillm.run.session import Session
from mpillm.run.sharing import Sharing
from mpillm.run.time_left import TimeLeft
from mpillm.store.journal import Journal
from mpillm.store.records import Counts, Result
from mpillm.store.report import SHOWN_ERRORS, Tokens
from mpillm.weights.finite import first_not_finite
from mpillm.weights.identity import ModelChangedError
from mpillm.weights.inventory import tensor_name
from mpillm.words import count_of

# Points of the report's timeline at most; seconds between two of them at least, and later a part of the time so far.
TIMES, SAMPLE, PART = 4096, 0.02, 1 / 1000
CHECK_EVERY = 1.0  # seconds between two checks of the output directory


class Computation:
    """Computes the unanswered requests of a job on the ranks of a session."""

    def __init__(self, job: OpenedJob, session: Session, journal: Journal, totals: Totals) -> None:
        """`totals` are new, or those of the computation that this one continues."""
        self.job, self.session, self.journal = job, session, journal
        journal.counted = self._counted
        chosen, several = session.chosen, len(session.replicas) > 1
        steps = session.choice.replica_steps(session.machines, chosen) if several else []
        sharing = Sharing(steps, chosen.shares)
        self._balance = Balance(session) if watched(session) else None
        self._leader = Leader(session, job.spec, lambda: job.model, self._keep, totals)
        lines = (Unfinished(line, journal.partial(line)) for line in job.input.unanswered(journal.done))
        count = unanswered(job.input, journal)
        busy = self._balance.note if self._balance is not None else None
        self._dispatcher = Dispatcher(
            session, self._leader, sharing, lines, count, self._assigned, self._keep, busy, self._arrived
        )
        self._unanswered = count
        self._began = self._checked = time.monotonic()
        self._left = TimeLeft(len(journal.done) + count, len(journal.done))

    def let_go(self) -> None:
        """Release weights, KV cache and layers of the session, which is closed; `continued` does not need them."""
        self.session.worker.let_go()
        del self.session.weights, self.session.kv

    def continued(self, session: Session) -> Computation:
        """Return the computation of the remaining requests with a new session; the journal has the others.

        Call it again with another session if a loss came before the returned computation began.
        """
        if not self.journal.closed:
            self._leader.save_everything()
            self.journal.flush()
            self.close()
        journal = open_journal(session, self.job.spec, self.job.input, self.job.claim)
        return Computation(self.job, session, journal, self.totals)

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()

    @property
    def totals(self) -> Totals:
        """The totals of all replicas so far."""
        return added([self._leader.engine.totals, *self._dispatcher.totals])

    @property
    def tokens(self) -> Tokens:
        """The tokens of this start so far, for journal and report."""
        totals = self.totals
        return Tokens(
            prompt=totals.prompt_tokens + totals.shared_tokens,
            generated=totals.generated_tokens,
            shared=totals.shared_tokens,
            recomputed=totals.recomputed_tokens,
        )

    def run(self, since: float) -> Slowed | None:
        """Compute all requests; every rank checks that the model's files have not changed.

        `since` is when the ranks began to compute (time.monotonic()); progress counts from it. The other ranks stop
        when everything is computed, and when an error ends the computation. If the layout should change, it stops
        earlier and returns why; `continued` computes the rest.
        """
        for line in self._capacity():
            self.job.progress.say(line)
        try:
            slowed = self._compute(since)
        except MpillmError as error:
            with suppress(MpillmError):  # such as a full disk, most likely the reason of the first error too
                self._dispatcher.stop(error.exit_code)
                if isinstance(error, ModelChangedError):
                    self.journal.drop_unverified()
                elif self.job.spec.job.checkpoint_tokens:
                    self._leader.save_everything()
                self.journal.flush()
            self._leader.engine.stop(error.exit_code)
            raise
        self._leader.engine.stop(AGAIN if slowed else 0)
        self._dispatcher.part()
        if slowed is not None:
            return slowed
        self._verify_model()
        if self.job.not_finite:
            self.job.warn(self._why_not_finite())
        return None

    def check_output(self) -> None:
        """Raise Interrupted if the output directory or the journal was moved or deleted."""
        self.job.claim.check()
        self.journal.check()
        self._checked = time.monotonic()

    def _compute(self, since: float) -> Slowed | None:
        leader, dispatcher, slowed = self._leader, self._dispatcher, None
        dispatcher.serve()
        left, done = unanswered(self.job.input, self.journal), len(self.journal.done)
        tokens = self.totals.prompt_tokens + self.totals.generated_tokens
        with self.job.progress.requests(done + left, done, tokens, since) as bar:
            for finished in leader.engine.run(leader.requests(self._next), partial(self._more, bar)):
                for completion in finished:
                    if leader.take(completion):
                        dispatcher.answered_here()
                leader.save()
                dispatcher.serve()
                self._look(bar)
                if self._balance is not None and (slowed := self._balance.look(self._seconds_left)):
                    break
            dispatcher.stop(AGAIN if slowed else 0)
            self._show(self.journal.flush(), bar, last=True)
        return slowed

    def _seconds_left(self) -> float:
        """Estimate the remaining seconds from the mean time of an answered line so far."""
        left = unanswered(self.job.input, self.journal)
        return (time.monotonic() - self._began) * left / max(self._unanswered - left, 0.5)

    def _next(self) -> Given | None:
        """Return the next line for this replica; None if there is none at present."""
        given = self._dispatcher.take()
        return (self.job.input.work(given.line), given.partial) if given is not None else None

    def _more(self, bar: Bar) -> bool:
        """Wait until this replica has a line to compute; return False when all lines are answered."""
        with self._leader.waiting():
            while not self._dispatcher.done:
                if self._dispatcher.has_more:
                    return True
                self._dispatcher.wait()
                self._look(bar)
            return False

    def _assigned(self, given: Unfinished) -> Assigned:
        return Assigned(given.line, self.job.input.content(given.line), given.partial)

    def _keep(self, record: AnswerRecord) -> None:
        """Append a record, of any replica, to the journal."""
        if isinstance(record, Result) and record.status != 200 and len(self.job.not_finite) < SHOWN_ERRORS:
            self.job.not_finite[record.custom_id] = NOT_FINITE
        self.journal.append(record)

    def _arrived(self) -> None:
        """Note the files of replicas that are ready now, and what differs between the ranks."""
        arrivals = self.session.arrivals
        self.journal.join(arrivals.states)
        for warning in arrivals.warnings:
            if warning not in self.job.warnings:
                self.job.warn(warning)

    def _look(self, bar: Bar) -> None:
        """Between steps: write due records to disk, show the progress, and check that the files still exist."""
        self._show(self.journal.commit(), bar)
        if time.monotonic() > self._checked + CHECK_EVERY:
            self.check_output()
        if self.session.watch.check():
            self.journal.mark_verified()

    def _verify_model(self) -> None:
        try:
            with self.session.world.together():
                self.session.watch.check_all()
        except ModelChangedError:
            self.journal.drop_unverified()
            raise
        self.journal.mark_verified(all_ranks=True)
        self.journal.flush()

    def _show(self, count: int, bar: Bar, last: bool = False) -> None:
        """Show that `count` more requests are on disk, and note it for the report if that is due or nothing follows."""
        since, timeline = time.monotonic() - self.job.phases.since, self.job.timeline
        if not timeline:
            timeline.append((0.0, 0, self.journal.resumed))
        if last or since > timeline[-1][0] + max(SAMPLE, PART * since):
            if len(timeline) >= TIMES:
                del timeline[1::2]
            timeline.append((since, self.totals.generated_tokens, len(self.journal.done)))
        bar.update(count, self._state)

    def _counted(self) -> Counts:
        """Return the counts of this start so far."""
        return Counts(
            start=1 + max((counts.start for counts in self.job.earlier), default=0),
            seconds=time.monotonic() - self.job.phases.since,
            left=self._time_left(),
            **msgspec.structs.asdict(self.tokens),
        )

    def _state(self) -> ProgressState:
        """Return the state of the run for the progress display."""
        totals, session = self.totals, self.session
        elapsed = max(time.monotonic() - self.job.phases.since, 1e-9)
        weights = session.weights
        caches = [weights.cycle, *([weights.experts] if weights.experts else [])]
        hits = sum(cache.counters.hits for cache in caches)
        uses = hits + sum(cache.counters.misses for cache in caches)
        return ProgressState(
            tokens=totals.prompt_tokens + totals.generated_tokens,
            hits=hits / uses if uses and (max(session.streamed) or weights.experts) else None,
            stalled=weights.stall_seconds / elapsed,
            waited=sum(count["seconds"] for count in session.counters.as_dict().values()) / elapsed,
            per_pass=totals.generated_tokens / totals.turns if totals.accepted_tokens else None,
            left=self._time_left(),
            slowest=self._balance.slowest() if self._balance is not None else None,
        )

    def _time_left(self) -> float | None:
        """Return seconds, by what this session has computed."""
        elapsed = time.monotonic() - self._began
        return self._left.seconds(len(self.journal.done), self._dispatcher.begun, elapsed)

    def _capacity(self) -> Iterator[str]:
        """Yield lines about the size of a step and of the KV cache, if memory limits them."""
        session, limits, memory = self.session, self.session.limits, self.job.spec.memory
        if streamed := max(session.streamed):
            size = step_description(limits.max_sequences, limits.max_tokens, streamed)
            yield size[0].upper() + size[1:] + "."
        if limits.n_blocks > limits.blocks_in_memory:
            context = memory.context(session.config.max_position)
            in_memory, in_all = (
                cached_tokens(blocks, limits.windows, context)
                for blocks in (limits.blocks_in_memory, limits.n_blocks)
            )
            yield (
                f"The KV cache holds {count_of(in_memory, 'token')} in memory, and {in_all} with "
                f"layers in {memory.spill_folder}."
            )
        elif memory.kv_spill_bytes:
            yield "memory.kv_spill is not needed, or costs more than it gains: the KV cache stays in memory."

    def _why_not_finite(self) -> str:
        count = self.journal.done.failed
        what = f"The model's output is not finite (NaN or infinity) for {count_of(count, 'request')}"
        key = first_not_finite(self.session.source)
        if key is not None:
            return f"{what}: in {self.job.path}, {tensor_name(key)} is not; fetch or convert the model again."
        return f"{what}, though its weights are."
