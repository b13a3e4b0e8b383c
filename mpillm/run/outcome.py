"""Writes the results of a computed job, and the report."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata

import msgspec

from mpillm.engine.limits import Totals
from mpillm.errors import OutputError
from mpillm.planning import memory
from mpillm.planning.job_time import Demand
from mpillm.run.computation import Computation
from mpillm.run.session import Session
from mpillm.store import report, results, table
from mpillm.store.journal_facts import began
from mpillm.version import __version__

PACKAGES = ("numpy", "mpi4py", "tokenizers", "gguf", "h5py")


def write(computation: Computation, ranks: list[report.RankStatistics], start: float) -> report.Report:
    """Write results and report of a run that began at `start`, and mark the journal as complete.

    `ranks` are the statistics of the ranks, rank 0's first. Raises Interrupted if the output directory is missing.
    """
    job, session, journal = computation.job, computation.session, computation.journal
    lines, directory = job.input.lines, job.claim.directory
    with _in_place(computation):
        errors = results.write_jsonl(directory, lines, journal)
        results.write_hdf5(directory, lines, journal, job.metadata(session))
        if job.spec.output.format != "none":
            table.write(directory, job.input.path, job.input.digest, job.spec.output.format)
    job.phases.end("write")
    ranks[0].memory_peak = memory.peak()  # includes writing; the other ranks measured theirs before
    made = report.Report(
        model=job.model_facts(session),
        job=msgspec.to_builtins(job.spec),
        input=report.Input(path=os.path.abspath(job.spec.input), digest=job.input.digest),
        began=began(job.claim).isoformat(),
        seconds=time.monotonic() - start,
        phases=job.phases.seconds,
        requests=report.Requests(
            total=len(lines), ok=len(lines) - errors, errors=errors, resumed=job.resumed
        ),
        tokens=computation.tokens,
        earlier=[
            report.Start(
                seconds=counts.seconds,
                tokens=msgspec.convert(counts, report.Tokens, from_attributes=True),
            )
            for counts in job.earlier
        ],
        batch=_steps(computation.totals, session),
        planned=_planned(computation),
        stages=session.place.stages,
        shards=session.place.shards,
        replicas=len(session.replicas),
        wire={"activations": session.wire, "between_stages": session.spec.wire.between_stages},
        ranks=ranks,
        versions=_versions(),
        timeline=job.timeline,
        errors=job.first_errors(),
        warnings=job.warnings,
    )
    with _in_place(computation):
        report.write(directory, made)
    journal.finish(errors)
    return made


@contextlib.contextmanager
def _in_place(computation: Computation) -> Iterator[None]:
    """Write files in the block; raises Interrupted if the output directory is missing before, in or after it."""
    computation.check_output()
    try:
        yield
    except OutputError:
        computation.check_output()  # says why
        raise
    computation.check_output()


def _steps(totals: Totals, session: Session) -> report.Steps:
    limits = session.limits
    return report.Steps(
        max_sequences=limits.max_sequences,
        max_tokens=limits.max_tokens,
        kv_blocks=limits.n_blocks,
        steps=totals.steps,
        peak_sequences=totals.peak_sequences,
        streamed=sum(session.streamed),
        turns=totals.turns,
        drafted=totals.drafted_tokens,
        accepted=totals.accepted_tokens,
        drafters={name: (count, totals.accepted[name]) for name, count in sorted(totals.drafted.items())},
    )


def _planned(computation: Computation) -> report.Planned | None:
    """Return the time that was planned from the speeds of the hosts; None if they were not measured."""
    session, totals, lines = computation.session, computation.totals, computation.job.input
    if not session.machines.speeds_known or not totals.steps:
        return None
    made = session.estimate(None)
    computed = session.estimate(
        Demand(
            requests=max(len(lines) - lines.bad - computation.job.resumed, 1),
            prompt=float(totals.prompt_tokens + totals.recomputed_tokens),
            generated=float(totals.generated_tokens),
            drafted=float(totals.drafted_tokens),
            accepted=float(totals.accepted_tokens),
        )
    )
    return report.Planned(
        seconds=made.seconds, of_computed=computed.seconds, limit=made.limit, bubble=made.bubble
    )


def _versions() -> dict[str, str]:
    found = {"mpillm": __version__, "python": platform.python_version()}
    return found | {package: metadata.version(package) for package in PACKAGES}
