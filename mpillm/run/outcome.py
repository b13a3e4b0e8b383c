"""Writing what a computed job leaves behind: the files with the results, and the report."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator
from importlib import metadata

import msgspec

from mpillm import __version__
from mpillm.engine.scheduler import Totals
from mpillm.errors import OutputError
from mpillm.run import memory
from mpillm.run.computation import Computation
from mpillm.run.session import Session
from mpillm.store import report, results
from mpillm.store.journal import began

PACKAGES = ("numpy", "mpi4py", "tokenizers", "gguf", "h5py")


def write(computation: Computation, ranks: list[report.RankStatistics], start: float) -> report.Report:
    """Write results and report of a run that began at `start`, and note in the journal that it is complete.

    `ranks` are the statistics of the ranks, rank 0's first. Interrupted if the output directory is gone.
    """
    job, session, journal = computation.job, computation.session, computation.journal
    lines, directory = job.input.lines, job.claim.directory
    with _in_place(computation):
        errors = results.write_jsonl(directory, lines, journal)
        results.write_hdf5(directory, lines, journal, job.metadata(session))
    job.phases.end("write")
    ranks[0].memory_peak = memory.peak()  # the other ranks measured theirs when computing ended
    made = report.Report(
        model=job.model_facts(session),
        job=msgspec.to_builtins(job.spec),
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
        stages=session.place.stages,
        shards=session.place.shards,
        replicas=len(session.replicas),
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
    """Files are written: Interrupted if the output directory is gone before, meanwhile or afterwards."""
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
        most_sequences=totals.most_sequences,
        streamed=sum(session.streamed),
    )


def _versions() -> dict[str, str]:
    found = {"mpillm": __version__, "python": platform.python_version()}
    return found | {package: metadata.version(package) for package in PACKAGES}
