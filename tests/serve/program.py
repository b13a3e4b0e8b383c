"""Runs `mpillm` and ends it with SIGKILL at the moment that KILLED names in the environment: `FUNCTION when COUNT`.

`when` is before or after the COUNTth call of a function below. NOTES is a file that gets what is computed and journaled
of batches.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from mpillm.batch.work import Work
from mpillm.cli import main
from mpillm.run import job
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
    if killed := os.environ.get("KILLED"):
        name, when, count = killed.rsplit(" ", 2)
        owner, attribute = PLACES[name]
        setattr(owner, attribute, deadly(getattr(owner, attribute), when, int(count)))
    sys.exit(main(sys.argv[1:]))
