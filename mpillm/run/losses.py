"""Ranks that were lost in a run, and the lines about them in messages and the report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpillm.errors import Interrupted, MpillmError
from mpillm.run.job import results_differ
from mpillm.run.session import Session


@dataclass(frozen=True)
class Loss:
    """Ranks that were lost together, and the time.monotonic() at which this rank noticed."""

    ranks: tuple[str, ...]
    noticed: float


Losses = tuple[Loss, ...]  # since the run began; on rank 0 those that it has not yet reported


@contextmanager
def explaining(losses: Losses) -> Iterator[None]:
    """Turn an error in the block that a loss has caused into an interruption: the same command continues the run."""
    try:
        yield
    except Interrupted:
        raise
    except MpillmError as error:
        if not losses:
            raise
        raise Interrupted(
            f"After the loss of {_lost_ranks(losses)} the others cannot continue: {error} Run the same "
            "command again to continue."
        ) from error


def what_was_lost(losses: Losses, session: Session) -> str:
    """Return a line for the report: which ranks were lost, and how the others continued with `session`."""
    now, before = session.layout, session.origin.layout
    seconds = time.monotonic() - losses[-1].noticed
    replicas = f"{len(session.replicas)} replicas of " if len(session.replicas) > 1 else ""
    line = f"Lost {_lost_ranks(losses)}; the others continued after {seconds:.1f} s, as {replicas}{now}."
    if results_differ(now, before, session.spec.wire):
        line += (
            f" Later results may differ in their last digits from those of {before} (with [wire] f32 they "
            "would not)."
        )
    return line


def _lost_ranks(losses: Losses) -> str:
    return ", ".join(name for loss in losses for name in loss.ranks)
