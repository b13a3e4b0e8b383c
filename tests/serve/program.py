"""Runs `mpillm` and ends it with SIGKILL at the moment that KILLED names in the environment: `FUNCTION when COUNT`.

`when` is before or after the COUNTth call of a function below. NOTES is a file that gets what is computed and journaled
of batches. The rank that HANGING names does nothing any more at its step number 20.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from mpillm.batch.work import Work
from mpillm.cli import main
from mpillm.engine.reply import Reply
from mpillm.engine.step import Step
from mpillm.engine.worker import Worker
from mpillm.run import job, session
from mpillm.serve import batch_run
from mpillm.serve.arrivals import Ticket
from mpillm.serve.batches import Batches
from mpillm.serve.files import Descriptions, FileStore
from mpillm.store.journal import Journal


def deadly(function: Callable[..., Any], when: str, left: int) -> Callable[..., Any]:
    """The function, whose call number `left` ends the process."""

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if not left and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        made = function(*args, **kwargs)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    return called


def note(what: str, *names: str) -> None:
    """Write down what happened to lines of a batch."""
    with open(os.environ["NOTES"], "a") as file:
        file.writelines(f"{what} {name}\n" for name in names)


class NotedTicket(Ticket):
    """A line of a batch, whose computation is noted."""

    def __init__(self, work: Work, *more: Any) -> None:
        note("computed", work.custom_id)
        super().__init__(work, *more)


class NotedJournal(Journal):
    """A journal that notes what is on disk."""

    def flush(self) -> int:
        """Write, and note."""
        count = super().flush()
        note("journaled", *self.finished())
        return count


class HangingWorker(Worker):
    """A worker of a rank that hangs."""

    steps = 0

    def step(self, step: Step) -> Reply | None:
        """Wait for ever in one of the steps."""
        self.steps += 1
        if self.steps == 20:
            threading.Event().wait()
        return super().step(step)


PLACES = {
    "append": (NotedJournal, "append"),
    "flush": (NotedJournal, "flush"),
    "status": (Batches, "_set"),
    "write": (batch_run.BatchRun, "write"),
    "wrong line": (batch_run, "bad_line"),
    "file": (FileStore, "add"),
    "description": (Descriptions, "write"),
    "end": (batch_run.BatchRun, "close"),
}


if __name__ == "__main__":
    batch_run.Ticket = NotedTicket  # type: ignore[misc]
    job.Journal = NotedJournal  # type: ignore[misc]
    if os.environ.get("HANGING") == os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "")):
        session.Worker = HangingWorker  # type: ignore[misc]
    if killed := os.environ.get("KILLED"):
        name, when, count = killed.rsplit(" ", 2)
        owner, attribute = PLACES[name]
        setattr(owner, attribute, deadly(getattr(owner, attribute), when, int(count)))
    sys.exit(main(sys.argv[1:]))
