"""The engine: rank 0 sends steps, and all ranks compute them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import groupby, islice

import numpy as np
from numpy.typing import NDArray

from mpillm.comm.collectives import Channel
from mpillm.engine import messages
from mpillm.engine.adjust import shifts
from mpillm.engine.blocks import NO_SLOT
from mpillm.engine.messages import Fetch, Stop
from mpillm.engine.pace import Pace
from mpillm.engine.reply import Reply, ReplyBuilder, merge
from mpillm.engine.sampler import Candidates, candidates_wanted, draw
from mpillm.engine.scheduler import Limits, Scheduler, Totals
from mpillm.engine.sequence import Completion, PartialCompletion, Request, Sequence
from mpillm.engine.step import NO_IDS, NO_SECOND, NO_SHIFTS, NO_TARGET, Chunk, Hidden, Output, Step, Table
from mpillm.model.cache_layout import blocks_for
from mpillm.model.decoder import Decoder
from mpillm.partition.grid import Place

MORE = 8  # the factor by which the number of candidates grows where they did not suffice


class Worker:
    """Computes a rank's share of the work that a message asks for; the leader and the followers each have one."""

    def __init__(self, decoder: Decoder, micro_batches: int, threads: int) -> None:
        self.decoder = decoder
        self.seconds = 0.0  # in steps, including waits
        self.longest = 0.0  # seconds of the longest step
        self._replies = ReplyBuilder(decoder, keep_steps=micro_batches, threads=threads)

    def compute(self, message: Step | Fetch) -> Reply | None:
        """Do this rank's share of what a message asks for; return the reply, on a last-stage rank."""
        if isinstance(message, Step):
            return self.step(message)
        return self._replies.fetch(message) if self.decoder.is_last else None

    def step(self, step: Step) -> Reply | None:
        """Compute this rank's share of a step; return the reply, on a last-stage rank."""
        start = time.perf_counter()
        x = self.decoder.forward(step.batch())
        reply = None if x is None else self._replies.build(step, x)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.longest = max(self.longest, seconds)
        self.decoder.note_step(seconds)
        return reply

    @property
    def paging(self) -> tuple[float, float]:
        """Seconds so far of waiting for weights and of loading them."""
        return self.decoder.paging


def follow(worker: Worker, channel: Channel, check: Callable[[], object] = lambda: None) -> int:
    """Follow the leader's messages until it sends stop; return its exit code. `check` is called before each message."""
    while True:
        check()
        message = messages.decode(channel.take())
        if isinstance(message, Stop):
            return message.exit_code
        reply = worker.compute(message)
        if reply is not None:
            channel.reply(reply.encode())


class Engine:
    """Computes requests on all ranks; it exists on rank 0."""

    def __init__(
        self,
        worker: Worker,
        channel: Channel,
        limits: Limits,
        shard_vocab: list[int],
        totals: Totals | None = None,
    ) -> None:
        """`totals` are those of the engine that this one replaces, if any."""
        self.totals = totals or Totals()
        self._worker = worker
        self._channel = channel
        self._limits = limits
        self._shard_vocab = shard_vocab  # rows of the vocabulary on each shard of the last stage
        self._last_stage = _last_stage_ranks(worker.decoder.place)
        self._scheduler: Scheduler | None = None  # of the current run, or of the last one
        self._replies: dict[tuple[int, int], Reply] = {}  # by rank and step: received, not used yet

    def run(
        self, requests: Iterable[Request], more: Callable[[], bool] | None = None
    ) -> Generator[list[Completion], None, None]:
        """Compute requests that `Limits` admits; yield after each step what it finished (mostly nothing).

        The generator may be closed before its end.

        A server's `requests` is an iterator that may go on after it has ended: `more` is called when nothing is left to
        do, waits for the next request, and returns False when there will be none.
        """
        sequences = _Sequences(requests, self.totals)
        scheduler = Scheduler(self._limits, sequences, self.totals)
        self._scheduler = scheduler
        pace = Pace(self._limits)
        in_flight: deque[tuple[Step, list[tuple[Sequence, int]]]] = deque()
        try:
            while scheduler.has_work() or (more is not None and more()):
                while len(in_flight) < pace.micro_batches and (chosen := scheduler.next(pace.micro_batches)):
                    self.totals.most_blocks = max(self.totals.most_blocks, scheduler.blocks_in_use)
                    with pace.measured(self._worker):
                        in_flight.append((self._start(chosen), chosen))
                if not in_flight:  # what had come was withdrawn
                    assert more is not None
                    continue
                step, chosen = in_flight.popleft()
                done = self._finish(step, chosen)
                for sequence in done:
                    scheduler.release(sequence)
                yield [sequence.completion() for sequence in (*sequences.take_ended(), *done)]
        except GeneratorExit:
            # Nobody wants the rest; the replies to what is under way are taken, so that no rank waits to send them.
            for step, _ in in_flight:
                self._collect(step.number)
            raise
        if ended := sequences.take_ended():
            yield [sequence.completion() for sequence in ended]

    def unsaved(self, at_least: int = 1) -> Iterator[tuple[Request, int, PartialCompletion]]:
        """What unfinished sequences have generated since the last call, if that is `at_least` tokens.

        Yields the request, the number of tokens that were yielded before, and what follows them.
        """
        for sequence in self._scheduler.unfinished if self._scheduler else ():
            if sequence.generated - sequence.saved >= at_least:
                partial, start = sequence.partial(), sequence.saved
                sequence.saved = len(partial.tokens)
                yield sequence.request, start, partial.since(start)

    def stop(self, exit_code: int) -> None:
        """Tell all followers to stop."""
        self._channel.post(messages.encode(Stop(exit_code)))

    def _start(self, chosen: list[tuple[Sequence, int]]) -> Step:
        step = Step(self.totals.steps, tuple(_chunk(sequence, count) for sequence, count in chosen))
        self.totals.steps += 1
        self.totals.most_sequences = max(self.totals.most_sequences, len(chosen))
        self._post(step)
        return step

    def _post(self, message: Step | Fetch) -> None:
        """Send a message to all ranks, compute this rank's share, and keep its reply if it has one."""
        if self._worker.decoder.place.size > 1:
            self._channel.post(messages.encode(message))
        own = self._worker.compute(message)
        if own is not None:
            self._replies[0, own.step] = own

    def _collect(self, number: int) -> list[Reply]:
        """The last stage's replies to step `number`, by shard; replies to later steps may arrive before a fetch's."""
        for rank in self._last_stage:
            while (rank, number) not in self._replies:
                reply = Reply.decode(self._channel.collect(rank), self._worker.decoder.config.hidden)
                self._replies[rank, reply.step] = reply
        return [self._replies.pop((rank, number)) for rank in self._last_stage]

    def _finish(self, step: Step, chosen: list[tuple[Sequence, int]]) -> list[Sequence]:
        """Take the results of a step; return the sequences that it finished."""
        replies = self._collect(step.number)
        candidates = merge(replies, step.outputs, self._shard_vocab)
        drawn = self._draw(step, chosen, candidates)
        pairs = zip(step.outputs, candidates, strict=True)
        by_chunk = {chunk: list(group) for chunk, group in groupby(pairs, lambda pair: pair[0].chunk)}
        hidden = iter(replies[0].hidden)
        finished = []
        for index, (chunk, (sequence, count)) in enumerate(zip(step.chunks, chosen, strict=True)):
            sequence.in_flight = False
            self._count(sequence, count)
            _pool(sequence, islice(hidden, {Hidden.NONE: 0, Hidden.ALL: count}.get(chunk.hidden, 1)))
            outputs = by_chunk.get(index, [])
            sequence.finite = all(found.finite for _, found in outputs)
            if sequence.finite:
                generated = sequence.generated
                _take(sequence, outputs, drawn.get(index))
                self.totals.generated_tokens += sequence.generated - generated
            if _is_done(sequence):
                if chunk.hidden is Hidden.ALL and sequence.pooled is not None:
                    sequence.pooled /= len(sequence.tokens)
                finished.append(sequence)
        return finished

    def _count(self, sequence: Sequence, count: int) -> None:
        """Note that `count` more tokens of a sequence are in the KV cache."""
        begin, end = max(sequence.computed, sequence.reached), sequence.computed + count
        self.totals.prompt_tokens += max(0, min(end, len(sequence.request.prompt)) - begin)
        self.totals.recomputed_tokens += min(count, begin - sequence.computed)
        sequence.computed = end
        sequence.loads = sequence.saves = NO_SLOT
        sequence.reached = max(sequence.reached, end)

    def _draw(
        self, step: Step, chosen: list[tuple[Sequence, int]], candidates: list[Candidates]
    ) -> dict[int, tuple[Candidates, int]]:
        """By chunk: the next token, as an index into the candidates it was drawn from.

        Where a draw needs more candidates than there are, one message fetches more for all such outputs.
        """
        drawn: dict[int, tuple[Candidates, int]] = {}
        known = {i: found for i, found in enumerate(candidates) if step.outputs[i].sampled and found.finite}
        numbers: dict[int, float] = {}
        while known:
            undecided = []
            for i, found in known.items():
                chunk = step.outputs[i].chunk
                sequence, _ = chosen[chunk]
                if i not in numbers:
                    numbers[i] = sequence.uniform() if sequence.request.temperature > 0 else 0.0
                index = draw(found, sequence.request, numbers[i])
                if index is None:
                    undecided.append(i)
                else:
                    drawn[chunk] = found, index
            known = self._fetch(step, {i: known[i] for i in undecided})
        return drawn

    def _fetch(self, step: Step, known: dict[int, Candidates]) -> dict[int, Candidates]:
        """Fetch more candidates of some outputs of a step: of those that have the fewest.

        So the number of candidates from which a token is drawn does not depend on the other outputs.
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


class _Sequences:
    """The sequences of requests, without those that an earlier run has completed: `take_ended` returns these."""

    def __init__(self, requests: Iterable[Request], totals: Totals) -> None:
        self._requests, self._totals = iter(requests), totals
        self._submitted = time.monotonic()
        self._ended: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        return self

    def __next__(self) -> Sequence:
        while True:
            sequence = Sequence(next(self._requests), self._submitted)
            generated = sequence.generated
            sequence.append_forced()
            self._totals.generated_tokens += sequence.generated - generated
            if sequence.finish_reason is None:
                return sequence
            sequence.started = time.monotonic()
            self._ended.append(sequence)

    def take_ended(self) -> list[Sequence]:
        """Completed sequences since the last call."""
        ended, self._ended = self._ended, []
        return ended


def _pool(sequence: Sequence, states: Iterator[NDArray[np.float32]]) -> None:
    """Add final hidden states to the sum over the tokens before."""
    for state in states:
        exact = state.astype(np.float64)
        sequence.pooled = exact if sequence.pooled is None else sequence.pooled + exact


def _take(
    sequence: Sequence, outputs: Iterable[tuple[Output, Candidates]], drawn: tuple[Candidates, int] | None
) -> None:
    """Store the log-probabilities that the request wants, and the token that was drawn."""
    request = sequence.request
    unpenalised: Candidates | None = None
    for output, found in outputs:
        if output.target != NO_TARGET:
            sequence.prompt_logprobs.append(found.target_logit - found.log_z)
            sequence.prompt_top.append(found.top(request.prompt_logprobs or 0))
        elif not output.sampled:
            unpenalised = found
        else:
            assert drawn is not None
            candidates, index = drawn
            sequence.append(int(candidates.ids[index]))
            sequence.append_forced()
            if request.logprobs is not None:
                sequence.logprobs.append(candidates.logprob(index))
                sequence.top.append((unpenalised or found).top(request.logprobs))


def _chunk(sequence: Sequence, count: int) -> Chunk:
    """The chunk of the next `count` tokens of a sequence."""
    request = sequence.request
    start, end = sequence.computed, sequence.computed + count
    prompt = request.prompt
    at_end = end == len(sequence.tokens)
    samples = request.kind == "generate" and request.max_tokens > 0 and at_end
    fresh = start >= sequence.passed_over  # tokens that are computed again were scored or pooled before
    scores = request.prompt_logprobs is not None and fresh and start < len(prompt) - 1
    hidden = Hidden.NONE
    if request.kind == "embed":
        if request.pooling == "mean":
            hidden = Hidden.ALL if fresh else Hidden.NONE
        elif request.pooling == "cls":
            hidden = Hidden.FIRST if start == 0 and fresh else Hidden.NONE
        elif at_end:
            hidden = Hidden.LAST
    penalised = samples and request.repetition_penalty != 1.0
    allowed = request.allowed
    if samples and sequence.constraint is not None:
        allowed = sequence.constraint.allowed()
    return Chunk(
        start=start,
        tokens=np.array(sequence.tokens[start:end], np.int32),
        tables=tuple(
            Table(table.first, np.array(table.blocks[: blocks_for(end) - table.first], np.int32))
            for table in sequence.tables
        ),
        slot=sequence.slot,
        loads=sequence.loads,
        saves=sequence.saves,
        second=NO_SECOND if request.second is None else request.second,
        score_k=request.prompt_logprobs or 0 if scores else -1,
        successor=prompt[end] if scores and end < len(prompt) else NO_TARGET,
        sample_k=candidates_wanted(request) if samples else 0,
        logprobs=-1 if request.logprobs is None else request.logprobs,
        # Rounded to float32, as the followers read them.
        temperature=float(np.float32(request.temperature)),
        penalty=float(np.float32(request.repetition_penalty)) if samples else 1.0,
        seen=np.unique(np.array(sequence.tokens, np.int32)) if penalised else NO_IDS,
        shifts=shifts(sequence) if samples else NO_SHIFTS,
        allowed=allowed if samples and allowed is not None else NO_IDS,
        hidden=hidden,
        adapter=request.adapter,
    )


def _is_done(sequence: Sequence) -> bool:
    if sequence.finish_reason is not None or not sequence.finite:
        return True
    return sequence.request.only_reads and sequence.computed == len(sequence.tokens)


def _last_stage_ranks(place: Place) -> range:
    return range(place.size - place.shards, place.size)
