"""A job from its file to its results: rank 0 reads, asks and writes, all others follow."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from mpillm import __version__
from mpillm.batch import requests
from mpillm.batch.requests import CheckedInput
from mpillm.batch.work import Work
from mpillm.comm.faults import RankLost
from mpillm.comm.world import World
from mpillm.engine.engine import Engine, follow
from mpillm.engine.scheduler import Totals
from mpillm.engine.sequence import Completion, PartialCompletion, Request
from mpillm.errors import Interrupted, MpillmError
from mpillm.run import memory
from mpillm.run.limits import cached_tokens, step_description
from mpillm.run.opened import model_name, model_of, model_path
from mpillm.run.progress import Bar, Progress, State
from mpillm.run.session import Origin, Session
from mpillm.spec import Spec, Wire
from mpillm.store import report, results
from mpillm.store.journal import MODEL_FILE, Journal, began, first_layout
from mpillm.store.output import Claim
from mpillm.store.records import Layout, PartialResult, line_key
from mpillm.weights.finite import first_not_finite
from mpillm.weights.identity import ModelChangedError
from mpillm.weights.inventory import tensor_name

log = logging.getLogger(__name__)

TAKEOVER = 15.0  # seconds in which the lock of a lost rank 0 must be gone
LOOK_EVERY = 1.0  # seconds between two looks at whether the output is still where it was

NOT_FINITE = "The model's output for this request is not finite (NaN or infinity), so there is no answer."

PACKAGES = ("numpy", "mpi4py", "tokenizers", "gguf", "h5py")


def run(world: World, spec: Spec, progress: Progress) -> report.Report | None:
    """Run a job on all ranks (collective); rank 0 gets the report, the others None. MpillmError says what is wrong.

    Where MPI can go on without lost ranks, those that are left lay the model out anew and go on. When rank 0 is lost,
    another one takes its place, and the journal tells it where.
    """
    with ExitStack() as stack:
        part = _Part(world, spec, progress, stack)
        while True:
            try:
                with world.losses():
                    return part.play()
            except RankLost:
                noticed = time.monotonic()
            # Not in the except block: there the error still holds what the part had in memory.
            part.lose(world.shrink(3 * part.longest_step), noticed)


class _Part:
    """What a rank does in a run, and what it keeps when others are lost."""

    def __init__(self, world: World, spec: Spec, progress: Progress, stack: ExitStack) -> None:
        """What must be closed at the end goes to `stack`."""
        self._world, self._spec, self._progress, self._stack = world, spec, progress, stack
        self._begun = time.monotonic()
        self._claim: Claim | None = None
        self._leader: Leader | None = None
        self._origin: Origin | None = None
        self._lost: list[str] = []
        self._noticed = 0.0
        self.longest_step = 0.0  # seconds

    def lose(self, lost: list[str], noticed: float) -> None:
        """These ranks are gone, which this one noticed at `noticed`."""
        log.info("%s lost %s; agreed after %.3f s", self._world, ", ".join(lost), time.monotonic() - noticed)
        self._lost, self._noticed = [*self._lost, *lost], noticed

    def play(self) -> report.Report | None:
        """Do this rank's part until all is written; RankLost may come at any time."""
        world, leader = self._world, self._leader
        if not world.bcast(leader is not None and leader.computed):
            if self._origin is not None:
                stages, shards = self._origin.layout(world, self._spec.wire)
                world.continue_with(stages * shards)
            with ExitStack() as while_computing:
                try:
                    session = self._prepare(while_computing)
                except Interrupted:
                    raise
                except MpillmError as error:
                    if not world.lost:
                        raise
                    raise Interrupted(
                        f"After the loss of {', '.join(self._lost)} the others cannot go on: {error} "
                        "The same command goes on from here."
                    ) from error
                if not self._compute(session):
                    return None
        made = None
        with world.together():  # nobody leaves before everything is written
            if self._leader is not None:
                made = self._leader.write(self._begun)
        return made

    def _prepare(self, while_computing: ExitStack) -> Session:
        """A session, and on rank 0 a leader for it."""
        world, spec = self._world, self._spec
        with world.together():
            if world.rank == 0 and self._claim is None:
                patience = TAKEOVER if world.lost else 0.0
                self._claim = self._stack.enter_context(Claim(spec.output_path, patience))
        model = model_path(world, spec, self._progress)
        session = Session(world, spec, model, self._origin, self._shards_before())
        while_computing.enter_context(closing(session))
        self._origin = session.origin
        with world.together():
            if self._leader is not None:
                self._leader.go_on(session)
            elif self._claim is not None:
                leader = Leader(session, spec, model, self._claim, self._progress)
                self._leader = self._stack.enter_context(closing(leader))
        if self._leader is not None and self._lost:
            self._leader.warn(self._what_was_lost(session))
            self._lost = []
        return session

    def _shards_before(self) -> int | None:
        """How many shards the run was begun with, by its journal, where that matters for the results."""
        if self._spec.wire.activations == "f32":
            return None
        begun_with = None
        with self._world.together():
            if self._claim is not None:
                begun_with = first_layout(self._claim)
        return self._world.bcast(begun_with.shards if begun_with is not None else None)

    def _what_was_lost(self, session: Session) -> str:
        now, before = session.layout, Layout(session.origin.stages, session.origin.shards)
        seconds = time.monotonic() - self._noticed
        line = f"Lost {', '.join(self._lost)}; the others went on after {seconds:.1f} s, as {now}."
        if _differ(now, before, self._spec.wire):
            line += (
                f" What is computed from here on may differ in its last digits from what {before} would have given "
                "([wire] f32 would not)."
            )
        return line

    def _compute(self, session: Session) -> bool:
        """Whether all is computed; else the run ends before its time."""
        try:
            with self._world.computing():
                if self._leader is not None:
                    self._leader.compute()
                    return True
                if follow(session.worker, session.channel, session.watch.check) == 0:
                    with self._world.together():
                        session.watch.check_all()
                    self._world.gather(session.statistics())
                    return True
                return False
        finally:
            self.longest_step = session.worker.longest


def _differ(one: Layout, other: Layout, wire: Wire) -> bool:
    """Whether the last digits of results may differ between the layouts."""
    return (one.shards != other.shards and wire.activations != "f32") or (
        one.stages != other.stages and wire.between_stages != "f32"
    )


@dataclass
class _Pending:
    """A line whose choices are being computed."""

    work: Work
    missing: int
    completions: list[Completion | None] = field(default_factory=list)


class Leader:
    """Rank 0's side of a run: requests in, results out."""

    def __init__(self, session: Session, spec: Spec, model: Path, claim: Claim, progress: Progress) -> None:
        """Check the input and open the journal; MpillmError if either cannot be used."""
        self._session, self._spec, self._claim, self._progress = session, spec, claim, progress
        self._path = model
        self._name = model_name(model)
        self._phases: dict[str, float] = {}
        self._clock = time.monotonic()
        since = began(claim)
        self._model = model_of(session, model, lambda: since)
        self._batch: CheckedInput = requests.check(spec.input_path, spec, self._model)
        self._journal = self._open_journal()
        self._batch.keep_answered(self._journal.done)
        self._resumed = self._journal.resumed
        self._pending: dict[str, _Pending] = {}
        self._not_finite: dict[str, str] = {}
        self._timeline: list[tuple[float, int, int]] = []
        self._warnings = [
            *self._journal.damage,
            *self._other_layouts(),
            *self._model_names(),
            *session.bindings,
        ]
        for warning in self._warnings:
            progress.say(warning)
        self._engine = Engine(session.worker, session.channel, session.limits, session.shard_vocab)
        self._ranks: list[report.Rank] = []
        self._looked = time.monotonic()
        self.computed = False  # all that is to be computed
        self._phase("prepare")
        self._computing_since = self._clock

    def _open_journal(self) -> Journal:
        session = self._session
        identity = {MODEL_FILE + name: file for name, file in session.model.items()} | self._spec.identity()
        return Journal(self._claim, identity, self._batch.lines, session.layout, session.model_state)

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def warn(self, warning: str) -> None:
        """Say it now, and in the report."""
        self._progress.say(warning)
        self._warnings.append(warning)

    def go_on(self, session: Session) -> None:
        """Go on with a new session, as a new start of the run would, but for what this process knows already."""
        self._save_everything()
        self._journal.flush()
        self._journal.close()
        self._session, self._pending = session, {}
        self._journal = self._open_journal()
        self._engine = Engine(
            session.worker, session.channel, session.limits, session.shard_vocab, self._engine.totals
        )

    def compute(self) -> None:
        """Compute what is not done yet; the followers are sent home if that fails, and when it is done."""
        for line in self._size():
            self._progress.say(line)
        try:
            self._compute()
        except MpillmError as error:
            with suppress(MpillmError):  # a full disk, most likely: the first error says it
                if isinstance(error, ModelChangedError):
                    self._journal.drop_unverified()
                elif self._spec.job.checkpoint_tokens:
                    self._save_everything()
                self._journal.flush()
            self._engine.stop(error.exit_code)
            raise
        self._engine.stop(0)
        self._look_closely()
        self.computed = True
        own = self._session.statistics()
        self._ranks = [own]  # if no more can be had
        self._ranks = self._session.world.gather(own)
        if self._not_finite:
            self.warn(self._why_not_finite())
        self._phase("compute")

    def write(self, begun: float) -> report.Report:
        """Write the results, of a run that began at `begun`."""
        session, journal = self._session, self._journal
        lines, directory = self._batch.lines, self._claim.directory
        self._look()
        errors = results.write_jsonl(directory, lines, journal)
        results.write_hdf5(directory, lines, journal, self._metadata())
        self._phase("write")
        self._ranks[0].memory_peak = memory.peak()  # the other ranks have had theirs when computing ended
        made = report.Report(
            model=self._describe_model(),
            job=msgspec.to_builtins(self._spec),
            began=began(self._claim).isoformat(),
            seconds=time.monotonic() - begun,
            phases=self._phases,
            requests=report.Requests(
                total=len(lines), ok=len(lines) - errors, errors=errors, resumed=self._resumed
            ),
            tokens=_tokens(self._engine.totals),
            batch=_batch(self._engine.totals, session),
            stages=session.place.stages,
            shards=session.place.shards,
            ranks=self._ranks,
            versions=_versions(),
            timeline=self._timeline,
            errors=self._first_errors(),
            warnings=self._warnings,
        )
        report.write(directory, made)
        self._look()
        journal.finish(errors)
        return made

    def _compute(self) -> None:
        journal, every = self._journal, self._spec.job.checkpoint_tokens
        engine = self._engine
        with self._progress.requests(self._todo()) as bar:
            for finished in engine.run(self._requests()):
                for completion in finished:
                    self._take(completion)
                if every:
                    for unsaved in engine.unsaved(every):
                        self._save(*unsaved)
                self._safe(journal.commit(), bar)
                if time.monotonic() > self._looked + LOOK_EVERY:
                    self._look()
                if self._session.watch.check():
                    journal.mark_verified()
            self._safe(journal.flush(), bar)

    def _look_closely(self) -> None:
        """At the end every rank looks at its files of the model as closely as at the beginning."""
        try:
            with self._session.world.together():
                self._session.watch.check_all()
        except ModelChangedError:
            self._journal.drop_unverified()
            raise
        self._journal.mark_verified(all_ranks=True)
        self._journal.flush()

    def _look(self) -> None:
        """Interrupted if the output is no longer where it was."""
        self._claim.check()
        self._journal.check()
        self._looked = time.monotonic()

    def _todo(self) -> int:
        return len(self._batch) - len(self._batch.errors) - len(self._journal.done)

    def _safe(self, count: int, bar: Bar) -> None:
        """Tell of `count` more requests, which are on disk now."""
        totals = self._engine.totals
        if count:
            since = time.monotonic() - self._computing_since
            self._timeline.append((since, totals.generated_tokens, len(self._journal.done)))
        bar.update(count, self._state)

    def _state(self) -> State:
        """How the run goes, for those who watch it."""
        totals, session = self._engine.totals, self._session
        elapsed = max(time.monotonic() - self._computing_since, 1e-9)
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
        """The engine's requests, made line by line when their turn comes."""
        for work in self._batch.works(done=self._journal.done):
            count = len(work.requests)
            self._pending[work.custom_id] = _Pending(work, count, [None] * count)
            partial = self._journal.partial(work.line)
            for request in work.requests:
                if request.max_length > self._session.limits.max_length:
                    raise Interrupted(
                        f"Request {work.custom_id!r} does not fit into the KV cache of the ranks that are left; "
                        "the same command goes on with as many ranks as before."
                    )
                yield replace(request, resumed=partial.get(request.choice))

    def _take(self, completion: Completion) -> None:
        """Keep a completion; if it was its line's last one, the answer goes to the journal."""
        pending = self._pending[completion.request.id]
        pending.completions[completion.request.choice] = completion
        pending.missing -= 1
        if pending.missing:
            if len(completion.tokens) >= (self._spec.job.checkpoint_tokens or math.inf):
                self._save(completion.request, 0, completion.since(0))
            return
        del self._pending[completion.request.id]
        completions = [found for found in pending.completions if found is not None]
        if all(found.finite for found in completions):
            self._journal.append(results.finished(pending.work, completions, self._model))
        else:
            self._not_finite[pending.work.custom_id] = NOT_FINITE
            self._journal.append(results.failed(pending.work, NOT_FINITE, status=500))

    def _save(self, request: Request, start: int, partial: PartialCompletion) -> None:
        """Let the journal have what a choice has generated from token `start` on."""
        key = line_key(self._pending[request.id].work.line)
        self._journal.append(PartialResult(request.id, key, request.choice, start, partial))

    def _save_everything(self) -> None:
        """The run ends before its time: let nothing be generated again that need not be."""
        for unsaved in self._engine.unsaved():
            self._save(*unsaved)
        for pending in self._pending.values():
            for completion in pending.completions:
                if completion is not None and completion.tokens:
                    self._save(completion.request, 0, completion.since(0))

    def _phase(self, name: str) -> None:
        now = time.monotonic()
        self._phases[name] = now - self._clock
        self._clock = now

    def _model_names(self) -> Iterator[str]:
        """Lines may name a model, as OpenAI's do; this job has one, and says so where another is meant."""
        for name, count in self._batch.models.items():
            if name not in (self._spec.model, self._path.name, self._name):
                yield f"{count} request(s) name the model {name!r}; they are answered by {self._name}."

    def _other_layouts(self) -> Iterator[str]:
        """Runs before this one had other layouts, and that can be seen in the results."""
        answered, now = self._journal.answered, self._session.layout
        rest = [now] if self._todo() else []
        if any(_differ(one, other, self._spec.wire) for one in answered for other in (*answered, *rest)):
            counts = [f"{count} as {layout}" for layout, count in answered.items()]
            counts += [f"{self._todo()} now as {now}"] if rest else []
            yield (
                f"Requests are answered on several layouts: {', '.join(counts)}. With this [wire] the last digits of "
                "results depend on it (f32 would not)."
            )

    def _size(self) -> Iterator[str]:
        """What a step takes on, where that is more than usual."""
        session, limits, asked = self._session, self._session.limits, self._spec.memory
        if streamed := max(session.streamed):
            size = step_description(limits.max_sequences, limits.max_tokens, streamed)
            yield size[0].upper() + size[1:] + "."
        if limits.n_blocks > limits.blocks_in_memory:
            context = min(asked.max_context, session.config.max_position)
            in_memory, in_all = (
                cached_tokens(blocks, limits.windows, context)
                for blocks in (limits.blocks_in_memory, limits.n_blocks)
            )
            yield (
                f"The KV cache holds {in_memory} tokens in memory, and {in_all} with layers in {asked.spill_folder}."
            )
        elif asked.kv_spill_bytes:
            yield "memory.kv_spill is not needed, or costs more than it gains: the KV cache stays in memory."

    def _describe_model(self) -> dict[str, Any]:
        size, digest = self._session.fingerprint
        config = self._session.config
        return {
            "name": self._name,
            "path": str(self._path),
            "bytes": size,
            "fingerprint": digest,
            "architecture": config.architecture,
            "layers": config.n_layers,
            "hidden": config.hidden,
            "vocab": config.vocab,
            **({"ignored_keys": ", ".join(config.ignored_keys)} if config.ignored_keys else {}),
        }

    def _metadata(self) -> dict[str, Any]:
        """Attributes of results.h5: only what is the same however the run went."""
        described = self._describe_model()
        del described["path"]
        return {"model": described, "job": self._spec.identity()}

    def _why_not_finite(self) -> str:
        count = len(self._not_finite)
        what = f"The model's output is not finite (NaN or infinity) for {count} request(s)"
        key = first_not_finite(self._session.source)
        if key is not None:
            return f"{what}: in {self._path}, {tensor_name(key)} is not; fetch or convert the model again."
        return f"{what}, though its weights are."

    def _first_errors(self) -> dict[str, str]:
        bad = self._batch.errors[: report.SHOWN_ERRORS]
        errors = {line.custom_id: line.error or "" for line in bad} | self._not_finite
        return dict(islice(errors.items(), report.SHOWN_ERRORS))


def _tokens(totals: Totals) -> report.Tokens:
    return report.Tokens(
        prompt=totals.prompt_tokens + totals.shared_tokens,
        generated=totals.generated_tokens,
        shared=totals.shared_tokens,
        recomputed=totals.recomputed_tokens,
    )


def _batch(totals: Totals, session: Session) -> report.Steps:
    limits = session.limits
    return report.Steps(
        max_sequences=limits.max_sequences,
        max_tokens=limits.max_tokens,
        kv_blocks=limits.n_blocks,
        steps=totals.steps,
        most_sequences=totals.most_sequences,
        streamed=sum(session.streamed),
    )


def _versions() -> dict[str, str]:
    found = {"mpillm": __version__, "python": platform.python_version()}
    return found | {package: metadata.version(package) for package in PACKAGES}
