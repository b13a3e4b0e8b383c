"""A batch that the server computes beside its clients' requests: its lines become tickets, its answers a journal."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec

from mpillm.batch import requests
from mpillm.batch.answers import bad_line
from mpillm.batch.work import Model, Work
from mpillm.engine.request import FinishedCompletion
from mpillm.errors import MpillmError, NoSpace
from mpillm.run.time_left import AnswerLengths, TimeLeft
from mpillm.serve.arrivals import Ticket
from mpillm.store import results
from mpillm.store.directory import replacing
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from mpillm.store.records import Counts
from mpillm.store.status import Reader

log = logging.getLogger(__name__)

RETRY = 2.0  # seconds between two attempts to write to a full disk


class RequestCounts(msgspec.Struct, kw_only=True):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


def counts_on_disk(path: Path) -> RequestCounts:
    """Return the counts of a batch by the journal in its directory; zeros before that begins."""
    try:
        with contextlib.closing(Reader(path)) as reader:
            now = reader.look()
    except MpillmError:
        return RequestCounts()
    return RequestCounts(total=now.total, completed=now.answered - now.errors, failed=now.errors)


class BatchRun:
    """A batch that is computed. Its tickets and `commit` are for the engine's thread."""

    def __init__(
        self,
        batch: requests.CheckedInput,
        claim: Claim,
        open_journal: Callable[[requests.CheckedInput, Claim], Journal],
        model: Model,
    ) -> None:
        self._batch, self._claim, self._model = batch, claim, model
        self.cancelled = False
        self.waits = False  # waits for space on the disk
        self._retry = 0.0  # time.monotonic() until which it does
        self._under_way: dict[str, Ticket] = {}
        self._all_taken = self._over = False  # every line has become a ticket; the end was told
        with contextlib.ExitStack() as unless_made:
            unless_made.callback(claim.close)
            self._journal = open_journal(batch, claim)
            unless_made.pop_all()
        batch.keep_answered(self._journal.done)
        self._began: float | None = None  # time.monotonic() of the first ticket
        self._start = 1 + max((counts.start for counts in self._journal.counts), default=0)
        self._prompt = self._generated = 0  # tokens of this start's answers
        self._lengths = AnswerLengths()
        self._time_left = TimeLeft(len(batch) - batch.bad, len(self._journal.done))
        self._journal.counted = self._counted

    def counts(self) -> RequestCounts:
        """Return the numbers of all, completed and failed requests."""
        bad, done = self._batch.bad, len(self._journal.done)
        failed = bad + self._journal.done.failed
        return RequestCounts(total=len(self._batch), completed=bad + done - failed, failed=failed)

    def seconds_left(self) -> float | None:
        """Return the remaining seconds, from what this start has computed; None if they cannot be estimated yet."""
        if self._began is None:
            return None
        running = list(self._under_way.values())
        prompts = sum(ticket.work.prompt_tokens for ticket in running)
        generated = sum(ticket.generated for ticket in running)
        allowed = sum(request.max_tokens for ticket in running for request in ticket.work.requests)
        # A prompt is computed when its first token comes.
        computed = generated + sum(ticket.work.prompt_tokens for ticket in running if ticket.generated)
        whole = self._lengths.whole(prompts, allowed, generated)
        begun = len(running) * computed / whole if whole else 0.0
        return self._time_left.seconds(len(self._journal.done), begun, time.monotonic() - self._began)

    def _counted(self) -> Counts:
        """Return the progress of this start for `mpillm status`."""
        seconds = 0.0 if self._began is None else time.monotonic() - self._began
        left = self.seconds_left()
        return Counts(self._start, seconds, self._prompt, self._generated, shared=0, recomputed=0, left=left)

    def begin(self, add: Callable[[Iterator[Ticket]], object], ended: Callable[[], object]) -> None:
        """Give `add` a ticket for each line that is not answered; `commit` calls `ended` once all are."""
        self._add, self._ended = add, ended
        add(self._tickets())

    def _tickets(self) -> Iterator[Ticket]:
        if self._began is None:
            self._began = time.monotonic()
        for work in self._batch.ordered_works(done=self._journal.done):
            if work.custom_id in self._under_way:
                continue
            if self.cancelled or self.waits:
                return
            ticket = Ticket(work, partial(self._take, work))
            self._under_way[work.custom_id] = ticket
            yield ticket
        self._all_taken = True

    def _take(self, work: Work, completions: list[FinishedCompletion] | None) -> None:
        if completions is None:
            if self.cancelled:  # before this line has begun
                del self._under_way[work.custom_id]
            return  # else the server ends, and the batch does not
        ticket = self._under_way.pop(work.custom_id)
        if not ticket.cancelled:
            self._prompt += work.prompt_tokens
            for completion in completions:
                self._generated += len(completion.tokens)
                self._lengths.add(len(completion.tokens), completion.request.max_tokens)
            self._journal.append(results.ended(work, completions, self._model))

    def cancel(self) -> None:
        """Take no more lines; those that run end with their next token, without an answer."""
        self.cancelled = True
        for ticket in list(self._under_way.values()):
            ticket.cancel()

    def give_up(self) -> None:
        """End without results."""
        self._over = True
        self.cancel()

    def commit(self) -> None:
        """Bring what is finished to disk, if it is time, and say that the batch has ended, if it has.

        While the disk is full no more lines begin, and what is finished waits. OutputError if writing fails otherwise.
        """
        if self._over or time.monotonic() < self._retry:
            return
        ends = self._ends()
        try:
            self._journal.flush() if ends or self.waits else self._journal.commit()
        except NoSpace as error:
            self._retry = time.monotonic() + RETRY
            if not self.waits:
                log.warning("%s", error)
                self.waits = True
            return
        if self.waits:
            self.waits = False
            if not self.cancelled:
                self._add(self._tickets())
                return
        if ends:
            self._over = True
            self._ended()

    def _ends(self) -> bool:
        if self._under_way:
            return False
        counts = self.counts()  # a batch that waits for others has no tickets to ask
        return self._all_taken or self.cancelled or counts.completed + counts.failed == counts.total

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
        """Close its files; what cannot be written is computed again."""
        try:
            self._journal.flush()
        except MpillmError as error:
            log.warning("%s", error)
        self._journal.close()
        self._claim.close()
