"""The job that a command line names, from its job file and its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.cli.arguments import command_parser
from mpillm.comm.world import World
from mpillm.errors import JobError

if TYPE_CHECKING:
    from mpillm.spec import Spec

NO_JOBS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")  # what an input may be called
MODELS = (".gguf", ".m")
QUICKSTART = "quickstart.toml"


def job_on_every_rank(world: World, options: argparse.Namespace) -> Spec:
    """Return the job as rank 0 reads it, on every rank."""
    return world.on_rank_0(lambda: load_job(options))


def load_job(options: argparse.Namespace, planned: bool = False) -> Spec:
    """Return the checked job; JobError says what is wrong. One that is only `planned` needs no input or output."""
    from mpillm import spec

    job = getattr(options, "job", None)
    if job is not None and job.suffix in NO_JOBS:
        raise JobError(f"{job} is not a job file (TOML); to run its requests, type --input {job}.")
    if job is not None and _is_model(job):
        raise JobError(f"{job} is a model, not a job file (TOML); type --model {job}.")
    return spec.load(
        _job_file(options),
        getattr(options, "set", ()),
        model=getattr(options, "model", None),
        input=getattr(options, "input", None),
        output=getattr(options, "output", None),
        planned=planned,
    )


def _is_model(job: Path) -> bool:
    from mpillm.catalogue import models

    return models.is_pulled(str(job)) or job.suffix in MODELS or (job / "config.json").exists()


def job_of(words: list[str]) -> Spec:
    """Return the job that a command line names."""
    return load_job(command_parser().parse_args(words))


def _job_file(options: argparse.Namespace) -> Path | None:
    """Return the job file that the command line names, or the quickstart if it names nothing at all."""
    job: Path | None = getattr(options, "job", None)
    if job is not None or any(getattr(options, name, None) for name in ("model", "input", "output", "set")):
        return job
    from mpillm.tools.init import shipped

    return shipped("jobs") / QUICKSTART
