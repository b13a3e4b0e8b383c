"""Ranks that were lost in a run, and what is said of them."""

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
    """Ranks that were lost together, and time.monotonic() when this rank noticed."""

    ranks: tuple[str, ...]
    noticed: float


Losses = tuple[Loss, ...]  # since the run began; on rank 0 those that it has not told of yet


@contextmanager
def explaining(losses: Losses) -> Iterator[None]:
    """What fails after a loss, but would not without it, interrupts the run: the same command continues it."""
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
    """A line for the report: who was lost, and how the others went on with `session`."""
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
