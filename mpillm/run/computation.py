"""Computing a job's requests with one session, on rank 0: lines become requests, completions go to the journal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from mpillm.batch.answers import NOT_FINITE
from mpillm.batch.pending import Pending
from mpillm.engine.engine import Engine
from mpillm.engine.scheduler import Totals
from mpillm.engine.sequence import Completion, PartialCompletion, Request
from mpillm.errors import Interrupted, MpillmError
from mpillm.run.job import Job, open_journal, unanswered
from mpillm.run.limits import cached_tokens, step_description
from mpillm.run.progress import Bar, State
from mpillm.run.session import Session
from mpillm.store import results
from mpillm.store.journal import Journal
from mpillm.store.records import PartialResult, line_key
from mpillm.weights.finite import first_not_finite
from mpillm.weights.identity import ModelChangedError
from mpillm.weights.inventory import tensor_name

CHECK_EVERY = 1.0  # seconds between two checks of the output directory


class Computation:
    """The requests of a job that are not answered yet, on the ranks of a session."""

    def __init__(self, job: Job, session: Session, journal: Journal, totals: Totals) -> None:
        """`totals` are those of the computation that this one continues, or new ones."""
        self.job, self.session, self.journal = job, session, journal
        self.engine = Engine(session.worker, session.channel, session.limits, session.shard_vocab, totals)
        self._pending: dict[str, Pending] = {}
        self._checked = time.monotonic()

    def continued(self, session: Session) -> Computation:
        """The rest of this computation, with a new session; what was computed is in the journal."""
        self._save_everything()
        self.journal.flush()
        self.close()
        self._pending = {}
        journal = open_journal(session, self.job.spec, self.job.input, self.job.claim)
        return Computation(self.job, session, journal, self.engine.totals)

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()

    def run(self) -> None:
        """Compute all requests, and have every rank check that the model's files have not changed.

        The followers stop when all is computed, and also when an error ends the computation.
        """
        for line in self._capacity():
            self.job.progress.say(line)
        try:
            self._compute()
        except MpillmError as error:
            with suppress(MpillmError):  # such as a full disk, which is most likely the first error too
                if isinstance(error, ModelChangedError):
                    self.journal.drop_unverified()
                elif self.job.spec.job.checkpoint_tokens:
                    self._save_everything()
                self.journal.flush()
            self.engine.stop(error.exit_code)
            raise
        self.engine.stop(0)
        self._verify_model()
        if self.job.not_finite:
            self.job.warn(self._why_not_finite())

    def check_output(self) -> None:
        """Interrupted if the output directory or the journal was moved or deleted."""
        self.job.claim.check()
        self.journal.check()
        self._checked = time.monotonic()

    def _compute(self) -> None:
        journal, every = self.journal, self.job.spec.job.checkpoint_tokens
        with self.job.progress.requests(unanswered(self.job.input, journal)) as bar:
            for finished in self.engine.run(self._requests()):
                for completion in finished:
                    self._take(completion)
                if every:
                    for unsaved in self.engine.unsaved(every):
                        self._save(*unsaved)
                self._show(journal.commit(), bar)
                if time.monotonic() > self._checked + CHECK_EVERY:
                    self.check_output()
                if self.session.watch.check():
                    journal.mark_verified()
            self._show(journal.flush(), bar)

    def _verify_model(self) -> None:
        try:
            with self.session.world.together():
                self.session.watch.check_all()
        except ModelChangedError:
            self.journal.drop_unverified()
            raise
        self.journal.mark_verified(all_ranks=True)
        self.journal.flush()

    def _show(self, count: int, bar: Bar) -> None:
        """Show that `count` more requests are on disk."""
        if count:
            since = time.monotonic() - self.job.phases.since
            self.job.timeline.append((since, self.engine.totals.generated_tokens, len(self.journal.done)))
        bar.update(count, self._state)

    def _state(self) -> State:
        """The state of the run, for the progress display."""
        totals, session = self.engine.totals, self.session
        elapsed = max(time.monotonic() - self.job.phases.since, 1e-9)
        weights = session.weights
        caches = [weights.cycle, *([weights.experts] if weights.experts else [])]
        hits = sum(cache.counters.hits for cache in caches)
        uses = hits + sum(cache.counters.misses for cache in caches)
        return State(
            tokens=totals.prompt_tokens + totals.generated_tokens,
            hits=hits / uses if uses and (max(session.streamed) or weights.experts) else None,
            stalled=weights.stall_seconds / elapsed,
            waited=sum(count["seconds"] for count in session.counters.as_dict().values()) / elapsed,
        )

    def _requests(self) -> Iterator[Request]:
        """The engine's requests, made line by line when the engine asks for them."""
        for work in self.job.input.ordered_works(done=self.journal.done):
            self._pending[work.custom_id] = Pending(work)
            partial = self.journal.partial(work.line)
            for request in work.requests:
                if request.max_length > self.session.limits.max_length:
                    raise Interrupted(
                        f"Request {work.custom_id!r} does not fit into the KV cache of the ranks that are left; "
                        "the same command goes on with as many ranks as before."
                    )
                yield replace(request, resumed=partial.get(request.choice))

    def _take(self, completion: Completion) -> None:
        """Keep a completion; the last one of a line sends the line's answer to the journal."""
        pending = self._pending[completion.request.id]
        completions = pending.take(completion)
        if completions is None:
            if len(completion.tokens) >= (self.job.spec.job.checkpoint_tokens or math.inf):
                self._save(completion.request, 0, completion.since(0))
            return
        del self._pending[completion.request.id]
        result = results.ended(pending.work, completions, self.job.model)
        if result.status != 200:
            self.job.not_finite[pending.work.custom_id] = NOT_FINITE
        self.journal.append(result)

    def _save(self, request: Request, start: int, partial: PartialCompletion) -> None:
        """Append what a choice has generated from token `start` on to the journal."""
        key = line_key(self._pending[request.id].work.line)
        self.journal.append(PartialResult(request.id, key, request.choice, start, partial))

    def _save_everything(self) -> None:
        """Append everything that unfinished lines have generated to the journal."""
        for unsaved in self.engine.unsaved():
            self._save(*unsaved)
        for pending in self._pending.values():
            for completion in pending.completions:
                if completion.tokens:
                    self._save(completion.request, 0, completion.since(0))

    def _capacity(self) -> Iterator[str]:
        """What a step computes and the KV cache holds, where memory makes that worth a line."""
        session, limits, memory = self.session, self.session.limits, self.job.spec.memory
        if streamed := max(session.streamed):
            size = step_description(limits.max_sequences, limits.max_tokens, streamed)
            yield size[0].upper() + size[1:] + "."
        if limits.n_blocks > limits.blocks_in_memory:
            context = min(memory.max_context, session.config.max_position)
            in_memory, in_all = (
                cached_tokens(blocks, limits.windows, context)
                for blocks in (limits.blocks_in_memory, limits.n_blocks)
            )
            yield (
                f"The KV cache holds {in_memory} tokens in memory, and {in_all} with layers in {memory.spill_folder}."
            )
        elif memory.kv_spill_bytes:
            yield "memory.kv_spill is not needed, or costs more than it gains: the KV cache stays in memory."

    def _why_not_finite(self) -> str:
        count = len(self.job.not_finite)
        what = f"The model's output is not finite (NaN or infinity) for {count} request(s)"
        key = first_not_finite(self.session.source)
        if key is not None:
            return f"{what}: in {self.job.path}, {tensor_name(key)} is not; fetch or convert the model again."
        return f"{what}, though its weights are."
