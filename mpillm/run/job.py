"""A job on rank 0 while it runs: its checked input, its journal, and the data of the report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mpillm import tracing
from mpillm.batch import requests
from mpillm.batch.requests import CheckedInput
from mpillm.batch.work import Model
from mpillm.run.opened import model_of
from mpillm.run.progress import Progress
from mpillm.run.session import Session
from mpillm.spec import Spec, WireSection
from mpillm.store import inputs
from mpillm.store.journal import Journal
from mpillm.store.journal_facts import began
from mpillm.store.output import Claim
from mpillm.store.records import Counts, UsedLayout
from mpillm.store.report import SHOWN_ERRORS
from mpillm.store.same_job import MODEL_FILE
from mpillm.weights.source import weight_types
from mpillm.words import count_of


class Phases:
    """Measures the seconds of each phase of a run; a phase begins when the one before it ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.since = time.monotonic()  # the beginning of the current phase

    def end(self, name: str) -> None:
        """End the current phase, whose name is `name`."""
        now = time.monotonic()
        self.seconds[name] = now - self.since
        tracing.add(name, self.since, self.seconds[name])
        self.since = now


@dataclass(frozen=True)
class OpenedJob:
    """A job whose input was checked. Its lists and dicts grow while it runs."""

    spec: Spec
    path: Path  # the path of the model
    model: Model
    input: CheckedInput
    claim: Claim
    progress: Progress
    resumed: int  # the number of requests that earlier starts finished
    earlier: tuple[Counts, ...]  # the counts of each earlier start
    phases: Phases
    warnings: list[str] = field(default_factory=list)
    not_finite: dict[str, str] = field(default_factory=dict)  # custom_id: message, of the first ones
    timeline: list[tuple[float, int, int]] = field(default_factory=list)  # see `Report.timeline`

    def warn(self, warning: str) -> None:
        """Show a warning now, and again in the report."""
        self.progress.say(warning)
        self.warnings.append(warning)

    def first_errors(self) -> dict[str, str]:
        """Return the first SHOWN_ERRORS requests that ended in an error, and their messages."""
        errors = {line.custom_id: line.error or "" for line in islice(self.input.errors, SHOWN_ERRORS)}
        return dict(islice((errors | self.not_finite).items(), SHOWN_ERRORS))

    def model_facts(self, session: Session) -> dict[str, Any]:
        """Return the facts about the model for the results and the report."""
        size, digest = session.fingerprint
        config = session.config
        return {
            "name": self.model.name,
            "path": str(self.path),
            "bytes": size,
            "fingerprint": digest,
            "architecture": config.architecture,
            "weights": ", ".join(weight_types(session.source)),
            "layers": config.n_layers,
            "hidden": config.hidden,
            "vocab": config.vocab,
            **({"ignored_keys": ", ".join(config.ignored_keys)} if config.ignored_keys else {}),
        }

    def metadata(self, session: Session) -> dict[str, Any]:
        """Return the attributes of results.h5, which do not depend on how the run proceeded."""
        model = self.model_facts(session)
        del model["path"], model["weights"]
        return {"model": model, "job": self.spec.identity()}


def open_job(
    session: Session, spec: Spec, path: Path, claim: Claim, progress: Progress
) -> tuple[OpenedJob, Journal]:
    """Check the input and open the journal; raises MpillmError if either cannot be used."""
    phases, since = Phases(), began(claim)
    model = model_of(session, path, lambda: since)
    lines = inputs.lines_path(spec)
    unit = "Line" if lines == spec.input_path else "Row"
    checked = requests.check(lines, spec, model, unit=unit, open_file=claim.directory.unnamed)
    journal = open_journal(session, spec, checked, claim)
    checked.keep_answered(journal.done)
    job = OpenedJob(spec, path, model, checked, claim, progress, journal.resumed, journal.counts, phases)
    for warning in (
        *journal.damage,
        *_layouts_that_differ(job, journal, session.layout),
        *_other_models(job),
        *session.warnings,
    ):
        job.warn(warning)
    return job, journal


def open_journal(session: Session, spec: Spec, checked: CheckedInput, claim: Claim) -> Journal:
    """Open the journal of the job; the next results will be computed with `session`."""
    identity = {MODEL_FILE + name: file for name, file in session.model.items()} | spec.identity()
    states = "+".join(sorted(session.arrivals.states))
    return Journal(claim, identity, checked.lines, session.layout, states, session.continues)


def unanswered(checked: CheckedInput, journal: Journal) -> int:
    """Return the number of requests that are still to be computed."""
    return len(checked) - checked.bad - len(journal.done)


def results_differ(one: UsedLayout, other: UsedLayout, wire: WireSection) -> bool:
    """Return whether the last digits of results may differ between two layouts."""
    # Journals of earlier versions lack the wire of a layout; if it was f32, the job says so.
    rounded = [1 if "f32" in (layout.wire, wire.activations) else layout.shards for layout in (one, other)]
    return rounded[0] != rounded[1] or (one.stages != other.stages and wire.between_stages != "f32")


def _layouts_that_differ(job: OpenedJob, journal: Journal, now: UsedLayout) -> Iterator[str]:
    """Yield a warning if earlier runs had layouts that change the last digits of results."""
    answered, left, wire = journal.answered, unanswered(job.input, journal), job.spec.wire
    rest = [now] if left else []
    if any(results_differ(one, other, wire) for one in answered for other in (*answered, *rest)):
        counts = [f"{count} as {layout}" for layout, count in answered.items()]
        counts += [f"{left} now as {now}"] if rest else []
        yield (
            f"Requests are answered on several layouts: {', '.join(counts)}. With this [wire] the last "
            "digits of results depend on the layout (with f32 they would not)."
        )


def _other_models(job: OpenedJob) -> Iterator[str]:
    """Yield warnings about lines that name another model than the job's; OpenAI's lines name one."""
    for name, count in job.input.models.items():
        if name not in (*job.spec.model_names, job.path.name, job.model.name, *job.model.adapters):
            beside = f"; its adapters are {', '.join(job.model.adapters)}" if job.model.adapters else ""
            yield f"The model of {count_of(count, 'request')} is {name!r}; {job.model.name} answers instead{beside}."
