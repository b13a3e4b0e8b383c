"""The engine of a replica: the leader schedules steps, all ranks compute them, and the leader draws tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mpillm.comm.channel import Channel
from mpillm.engine import messages
from mpillm.engine.blocks import NO_SLOT
from mpillm.engine.chunks import chunks_of
from mpillm.engine.draft_model import DraftModel
from mpillm.engine.limits import Limits, Totals
from mpillm.engine.messages import Fetch, Stop
from mpillm.engine.pace import Pace
from mpillm.engine.queue import NewSequences
from mpillm.engine.reply import Reply, merge
from mpillm.engine.request import FinishedCompletion, PartialCompletion, Request
from mpillm.engine.sampler import Candidates
from mpillm.engine.scheduler import Scheduler
from mpillm.engine.sequence import Sequence
from mpillm.engine.speculation import Speculation, may_draft
from mpillm.engine.step import Hidden, Step
from mpillm.engine.turn import Turn
from mpillm.engine.worker import Worker
from mpillm.partition.grid import Place

MORE = 8  # the factor by which the number of candidates grows if a draw needs more


class Engine:
    """Computes requests on all ranks of a replica; it exists on the leader."""

    def __init__(
        self,
        worker: Worker,
        channel: Channel,
        limits: Limits,
        shard_vocab: list[int],
        totals: Totals | None = None,
        draft_model: DraftModel | None = None,
    ) -> None:
        """`shard_vocab` has the vocabulary rows of each shard of the last stage; `totals` are an earlier engine's."""
        self.totals = totals or Totals()
        self._worker = worker
        self._channel = channel
        self._limits = limits
        self._shard_vocab = shard_vocab
        self._last_stage = _last_stage_ranks(worker.decoder.place)
        self._speculation: Speculation | None = None
        share = worker.decoder.config.expert_share
        if may_draft(limits.speculation, limits.windows, limits.n_slots, share, limits.max_sequences):
            self._speculation = Speculation(limits.speculation, limits.streams, share, draft_model)
        self._scheduler: Scheduler | None = None  # the scheduler of the current or the last run
        self._replies: dict[tuple[int, int], Reply] = {}  # received and not yet used, by rank and step

    def run(
        self, requests: Iterable[Request], more: Callable[[], bool] | None = None
    ) -> Generator[list[FinishedCompletion], None, None]:
        """Compute requests that `Limits` admits; yield after each step the requests that it finished, often none.

        The generator may be closed before its end. A server's `requests` may yield more after it has ended: when
        nothing is left to compute, `more` is called; it waits for the next request, and returns False if there will be
        none.
        """
        sequences = NewSequences(requests, self.totals)
        if self._speculation is not None:
            self._speculation.begin()
        scheduler = Scheduler(self._limits, sequences, self.totals, self._speculation)
        self._scheduler = scheduler
        pace = Pace(self._limits)
        in_flight: deque[tuple[Step, list[tuple[Sequence, int]]]] = deque()
        try:
            while True:
                if not scheduler.has_work():
                    # Requests that needed no step are returned before waiting for another request.
                    if ended := sequences.take_finished():
                        yield [sequence.completion() for sequence in ended]
                        continue
                    if more is None or not more():
                        return
                while len(in_flight) < pace.micro_batches and (chosen := scheduler.next(pace.micro_batches)):
                    self.totals.peak_blocks = max(self.totals.peak_blocks, scheduler.blocks_in_use)
                    with pace.measured(self._worker):
                        in_flight.append((self._start(chosen), chosen))
                if not in_flight:  # the new requests were withdrawn, or need no step
                    continue
                step, chosen = in_flight.popleft()
                done = self._finish(step, chosen)
                for sequence in done:
                    scheduler.release(sequence)
                    if self._speculation is not None:
                        self._speculation.ended(sequence)
                yield [sequence.completion() for sequence in (*sequences.take_finished(), *done)]
        except GeneratorExit:
            # Receive the replies that are under way, so that no rank waits to send one.
            for step, _ in in_flight:
                self._collect(step.number)
            raise

    @property
    def unfinished(self) -> list[Sequence]:
        """The sequences that have been admitted and are not finished."""
        return self._scheduler.unfinished if self._scheduler else []

    def withdraw(self, sequences: Iterable[Sequence]) -> None:
        """Stop computing these sequences; none of them may be in flight."""
        assert self._scheduler is not None
        for sequence in sequences:
            self._scheduler.withdraw(sequence)
            if self._speculation is not None:
                self._speculation.ended(sequence)

    def unsaved(self, at_least: int = 1) -> Iterator[tuple[Request, int, PartialCompletion]]:
        """Yield what unfinished sequences have generated since the last call, if it is at least `at_least` tokens.

        Yields the request, the number of its tokens that were yielded before, and the tokens after them.
        """
        for sequence in self.unfinished:
            self.totals.count_generated(sequence)  # a signal may have come between a draw and its count
            if sequence.generated - sequence.saved >= at_least:
                partial, start = sequence.partial(), sequence.saved
                sequence.saved = len(partial.tokens)
                yield sequence.request, start, partial.since(start)

    def stop(self, exit_code: int) -> None:
        """Tell all followers to stop."""
        self._channel.post(messages.encode(Stop(exit_code)))

    def _start(self, chosen: list[tuple[Sequence, int]]) -> Step:
        chunks = tuple(chunk for sequence, count in chosen for chunk in chunks_of(sequence, count))
        step = Step(self.totals.steps, chunks)
        self.totals.steps += 1
        self.totals.rows += sum(len(chunk.tokens) for chunk in chunks)
        self.totals.peak_sequences = max(self.totals.peak_sequences, len(chosen))
        seconds = self._worker.seconds
        self._post(step)
        if self._speculation is not None and all(count == 1 for _, count in chosen):
            self._speculation.note_step(len(chunks), self._worker.seconds - seconds)
        return step

    def _post(self, message: Step | Fetch) -> None:
        """Send a message to all ranks, compute this rank's share, and keep its reply, if it makes one."""
        if self._worker.decoder.place.size > 1:
            self._channel.post(messages.encode(message))
        own = self._worker.compute(message)
        if own is not None:
            self._replies[0, own.step] = own

    def _collect(self, number: int) -> list[Reply]:
        """Return the last stage's replies to step `number`, by shard; keep replies to later steps that arrive first."""
        for rank in self._last_stage:
            while (rank, number) not in self._replies:
                reply = Reply.decode(self._channel.collect(rank), self._worker.decoder.config.hidden)
                self._replies[rank, reply.step] = reply
        return [self._replies.pop((rank, number)) for rank in self._last_stage]

    def _finish(self, step: Step, chosen: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Process the replies to a step; return the sequences that it finished."""
        replies = self._collect(step.number)
        candidates = merge(replies, step.outputs, self._shard_vocab)
        hidden = iter(replies[0].hidden)
        turns = list(_turns(step, chosen))
        for turn in turns:
            if (kind := turn.chunk.hidden) is not Hidden.NONE:
                _pool(turn.sequence, islice(hidden, turn.count if kind is Hidden.ALL else 1))
            turn.take_scores(candidates)
        self._draw(step, turns, candidates)
        finished = []
        for turn in turns:
            sequence = turn.sequence
            sequence.in_flight = False
            self._count(turn)
            if _is_done(sequence):
                if turn.chunk.hidden is Hidden.ALL and sequence.pooled is not None:
                    sequence.pooled /= len(sequence.tokens)
                finished.append(sequence)
        return finished

    def _count(self, turn: Turn) -> None:
        """Note which tokens of a sequence are in the KV cache: the known ones, and accepted drafts."""
        sequence, totals = turn.sequence, self.totals
        accepted = turn.accepted
        count = turn.count + accepted
        begin, end = max(sequence.computed, sequence.reached), sequence.computed + count
        totals.prompt_tokens += max(0, min(end, len(sequence.request.prompt)) - begin)
        totals.recomputed_tokens += min(count, begin - sequence.computed)
        totals.count_generated(sequence)
        totals.turns += bool(turn.rows[0])
        sequence.computed = end
        sequence.loads = sequence.saves = NO_SLOT
        sequence.reached = max(sequence.reached, end)
        if sequence.drafts:
            assert self._scheduler is not None
            totals.count_drafts(sequence.drafts, accepted)
            self._scheduler.give_back(sequence)
            sequence.drafts = []
        if self._speculation is not None:
            self._speculation.judge(sequence)

    def _draw(self, step: Step, turns: list[Turn], candidates: list[Candidates]) -> None:
        """Draw tokens from each sequence's rows, one after the other; `candidates` has one element for each output.

        If draws need more candidates, one message fetches more for all their outputs.
        """
        while turns:
            undecided = {}
            for turn in turns:
                while row := turn.row:
                    if not turn.draw(row, candidates):
                        undecided[row[-1]] = turn
                        break
            for i, found in self._fetch(step, {i: candidates[i] for i in undecided}).items():
                candidates[i] = found
            turns = list(undecided.values())

    def _fetch(self, step: Step, known: dict[int, Candidates]) -> dict[int, Candidates]:
        """Fetch more candidates for those outputs of a step that have the fewest.

        So the number of candidates from which a token is drawn does not depend on other outputs.
        """
        if not known:
            return {}
        fewest = min(len(found.ids) for found in known.values())
        wanted = [i for i, found in known.items() if len(found.ids) == fewest]
        self.totals.fetched_rows += len(wanted)
        k = min(MORE * fewest, sum(self._shard_vocab))
        self._post(Fetch(step.number, tuple(wanted), k))
        outputs = [step.outputs[i]._replace(k=k) for i in wanted]
        more = merge(self._collect(step.number), outputs, self._shard_vocab)
        return known | dict(zip(wanted, more, strict=True))


def _turns(step: Step, chosen: list[tuple[Sequence, int]]) -> Iterator[Turn]:
    by_chunk: list[list[int]] = [[] for _ in step.chunks]
    for i, output in enumerate(step.outputs):
        by_chunk[output.chunk].append(i)
    first = 0
    for sequence, count in chosen:
        behind = first + 1 + len(sequence.drafts)
        yield Turn(sequence, count, step.chunks[first], by_chunk[first:behind], step)
        first = behind


def _pool(sequence: Sequence, states: Iterator[NDArray[np.float32]]) -> None:
    """Add a chunk's final hidden states to the sum over earlier tokens."""
    for state in states:
        exact = state.astype(np.float64)
        sequence.pooled = exact if sequence.pooled is None else sequence.pooled + exact


def _is_done(sequence: Sequence) -> bool:
    if sequence.finish_reason is not None or not sequence.finite:
        return True
    return sequence.request.only_reads and sequence.computed == len(sequence.tokens)


def _last_stage_ranks(place: Place) -> range:
    return range(place.size - place.shards, place.size)
