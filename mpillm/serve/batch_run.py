"""A batch that the server computes beside its clients' requests: its lines become tickets, its answers a journal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec

from mpillm.batch import requests
from mpillm.batch.answers import bad_line
from mpillm.batch.work import Model, Work
from mpillm.engine.request import FinishedCompletion
from mpillm.serve.arrivals import Ticket
from mpillm.store import results
from mpillm.store.directory import replacing
from mpillm.store.journal import Journal
from mpillm.store.output import Claim


class RequestCounts(msgspec.Struct, kw_only=True):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchRun:
    """A batch that is computed. `tickets` and `commit` are for the engine's thread."""

    def __init__(
        self,
        batch: requests.CheckedInput,
        claim: Claim,
        open_journal: Callable[[requests.CheckedInput, Claim], Journal],
        model: Model,
    ) -> None:
        self._batch, self._claim, self._model = batch, claim, model
        self.cancelled = False
        self._under_way: dict[str, Ticket] = {}
        self._all_taken = self._over = False  # every line has become a ticket; `ended` was called
        with contextlib.ExitStack() as unless_made:
            unless_made.callback(claim.close)
            self._journal = open_journal(batch, claim)
            unless_made.pop_all()
        batch.keep_answered(self._journal.done)

    def counts(self) -> RequestCounts:
        """How far it is."""
        bad, done = self._batch.bad, len(self._journal.done)
        failed = bad + self._journal.done.failed
        return RequestCounts(total=len(self._batch), completed=bad + done - failed, failed=failed)

    def tickets(self, ended: Callable[[], object]) -> Iterator[Ticket]:
        """A ticket for each line that is not answered; `ended` is called once all are."""
        self._ended = ended
        return self._tickets()

    def _tickets(self) -> Iterator[Ticket]:
        for work in () if self._over else self._batch.ordered_works(done=self._journal.done):
            ticket = Ticket(work, partial(self._take, work))
            self._under_way[work.custom_id] = ticket
            if self.cancelled:
                del self._under_way[work.custom_id]
                break
            yield ticket
            if self._over:
                return
        self._all_taken = True
        self._look_for_end()

    def _take(self, work: Work, completions: list[FinishedCompletion] | None) -> None:
        if completions is None:
            if self.cancelled:  # before this line has begun
                del self._under_way[work.custom_id]
            return  # else the server ends, and the batch does not
        ticket = self._under_way.pop(work.custom_id)
        if not ticket.cancelled:
            self._journal.append(results.ended(work, completions, self._model))
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self._over or self._under_way:
            return
        counts = self.counts()
        if self._all_taken or self.cancelled or counts.completed + counts.failed == counts.total:
            self._over = True
            self._journal.flush()
            self._ended()

    def cancel(self) -> None:
        """Take no more lines; those that run end with their next token, without an answer."""
        self.cancelled = True
        for ticket in list(self._under_way.values()):
            ticket.cancel()

    def commit(self) -> None:
        """Bring what is finished to disk, if it is time; end a batch that waits behind others with nothing to do."""
        if not self._over:
            self._journal.commit()
            self._look_for_end()

    def write(self) -> tuple[Path, Path]:
        """Write the results; the files of those that were answered, and of the others."""
        folder, journal = self._claim.path, self._journal
        answered, failed = folder / "output.jsonl", folder / "errors.jsonl"
        with replacing(answered) as good, replacing(failed) as bad:
            for line in self._batch.lines:
                if line.error is not None:
                    bad.write(bad_line(line) + b"\n")
                elif line.custom_id in journal.done:
                    result = journal.read(line.custom_id)
                    (good if result.status == 200 else bad).write(result.line + b"\n")
        return answered, failed

    def close(self) -> None:
        """Close its files."""
        self._journal.flush()
        self._journal.close()
        self._claim.close()
