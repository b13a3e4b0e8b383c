"""The leader of a replica: it turns lines into requests of its engine, and completions into records."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace

from mpillm.batch.pending import Pending
from mpillm.batch.work import Model, Work
from mpillm.engine.limits import Totals
from mpillm.engine.request import FinishedCompletion, PartialCompletion, Request
from mpillm.engine.sequence import Sequence
from mpillm.errors import Interrupted
from mpillm.run.dispatch_messages import Standing, Unfinished
from mpillm.run.session import Session
from mpillm.run.time_left import AnswerLengths
from mpillm.spec import Spec
from mpillm.store import results
from mpillm.store.records import PartialResult, Result, line_key

# A line, and what earlier runs generated for its choices.
Given = tuple[Work, Mapping[int, PartialCompletion]]


class Leader:
    """Computes lines with the engine of a replica, and passes their records to `keep`."""

    def __init__(
        self,
        session: Session,
        spec: Spec,
        model: Callable[[], Model],
        keep: Callable[[Result | PartialResult], None],
        totals: Totals | None = None,
    ) -> None:
        """`totals` are those of the engine that its engine replaces, if any."""
        self.engine = session.engine(totals)
        self._max_length, self._model, self._keep = session.limits.max_length, model, keep
        self._every = spec.job.checkpoint_tokens
        self._pending: dict[str, Pending] = {}
        self._began, self._idle = time.monotonic(), 0.0
        # Those of earlier engines.
        self._steps, self._rows = self.engine.totals.steps, self.engine.totals.rows
        self._lengths = AnswerLengths()

    def requests(self, take: Callable[[], Given | None]) -> Iterator[Request]:
        """Return an iterator of requests, made when the engine asks for them; `take` returns the next line or None."""
        return _Requests(take, self._begin)

    def _begin(self, work: Work, partial: Mapping[int, PartialCompletion]) -> Iterator[Request]:
        self._pending[work.custom_id] = Pending(work)
        for request in work.requests:
            if request.max_length > self._max_length:
                raise Interrupted(
                    f"Request {work.custom_id!r} does not fit into the KV cache of the remaining ranks; run "
                    "the same command again with as many ranks as before."
                )
            yield replace(request, resumed=partial.get(request.choice))

    def take(self, completion: FinishedCompletion) -> bool:
        """Keep a completion; return whether it was the last one of its line, which is then answered."""
        self._lengths.add(len(completion.tokens), completion.request.max_tokens)
        pending = self._pending[completion.request.id]
        completions = pending.take(completion)
        if completions is None:
            if len(completion.tokens) >= (self._every or math.inf):
                self._save(completion.request, 0, completion.since(0))
            return False
        del self._pending[completion.request.id]
        self._keep(results.ended(pending.work, completions, self._model()))
        return True

    def save(self) -> None:
        """Keep what unfinished choices have generated, if it is at least `job.checkpoint_tokens` tokens."""
        if self._every:
            for unsaved in self.engine.unsaved(self._every):
                self._save(*unsaved)

    def save_everything(self) -> None:
        """Keep everything that unfinished lines have generated."""
        for unsaved in self.engine.unsaved():
            self._save(*unsaved)
        for pending in self._pending.values():
            for completion in pending.completions:
                if completion.tokens:
                    self._save(completion.request, 0, completion.since(0))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Stop counting the time in the block, in which the leader has nothing to compute."""
        since = time.monotonic()
        yield
        self._idle += time.monotonic() - since

    def standing(self, waiting: int = 0) -> Standing:
        """Return its progress; `waiting` further lines that it holds count like the mean of the others."""
        totals, unfinished = self.engine.totals, self.engine.unfinished
        prompts = answers = 0  # tokens; of the answers, at most
        for pending in self._pending.values():
            done = {completion.request.choice for completion in pending.completions}
            for request in pending.work.requests:
                if request.choice not in done:
                    prompts += len(request.prompt)
                    answers += request.max_tokens
        generated = sum(one.generated for one in unfinished)
        whole = self._lengths.whole(prompts, answers, generated)
        left = whole - sum(one.computed for one in unfinished)
        lines = len(self._pending)
        alike, now = (lines + waiting) / max(lines, 1), time.monotonic()
        return Standing(
            steps=totals.steps - self._steps,
            rows=totals.rows - self._rows,
            seconds=now - self._began - self._idle,
            lines=lines + waiting,
            whole=int(whole * alike),
            left=int(max(left, 0) * alike),
            at=now,
        )

    def give_back(self, count: int) -> list[Unfinished]:
        """Stop computing up to `count` lines, those with the fewest generated tokens, and return them.

        The generated tokens are kept and returned, so that another leader can continue the lines.
        """
        running: dict[str, list[Sequence]] = {}
        for sequence in self.engine.unfinished:
            running.setdefault(sequence.request.id, []).append(sequence)
        advanced = sorted(
            (sum(one.generated for one in sequences), name)
            for name, sequences in running.items()
            if _movable(self._pending[name], sequences)
        )
        return [self._let_go(self._pending[name], running[name]) for _, name in advanced[:count]]

    def _let_go(self, pending: Pending, sequences: Seq[Sequence]) -> Unfinished:
        partial = {}
        for sequence in sequences:
            own = sequence.partial()
            if len(own.tokens) > sequence.saved:
                self._save(sequence.request, sequence.saved, own.since(sequence.saved))
            partial[sequence.request.choice] = own
        for completion in pending.completions:
            partial[completion.request.choice] = own = completion.since(0)
            if own.tokens:
                self._save(completion.request, 0, own)
        self.engine.withdraw(sequences)
        line = pending.work.line
        del self._pending[line.custom_id]
        return Unfinished(line, {choice: one for choice, one in partial.items() if one.tokens})

    def _save(self, request: Request, start: int, partial: PartialCompletion) -> None:
        """Keep what a choice has generated, from token `start` on."""
        key = line_key(self._pending[request.id].work.line)
        self._keep(PartialResult(request.id, key, request.choice, start, partial))


def _movable(pending: Pending, sequences: Seq[Sequence]) -> bool:
    """Return whether another leader can continue a line: each choice is finished, or generates and is not in flight."""
    requests = pending.work.requests
    return len(sequences) + len(pending.completions) == len(requests) and not any(
        one.in_flight or one.request.only_reads or (one.reached and not one.generated) for one in sequences
    )


class _Requests:
    """An iterator that may yield more after it has ended, because more lines may come."""

    def __init__(self, take: Callable[[], Given | None], begin: Callable[..., Iterator[Request]]) -> None:
        self._take, self._begin = take, begin
        self._ready: deque[Request] = deque()

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        if not self._ready:
            if (given := self._take()) is None:
                raise StopIteration
            self._ready.extend(self._begin(*given))
        return self._ready.popleft()
