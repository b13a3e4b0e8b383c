"""A run with replicas in virtual time: all of its code that shares lines is the real one, and steps only take time.

Each leader is a thread, of which one runs at a time: the one whose time has come.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from mpillm.batch.work import Line, Work
from mpillm.engine.limits import Limits, Totals
from mpillm.engine.queue import NewSequences
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.engine.scheduler import Scheduler
from mpillm.engine.sequence import Sequence as EngineSequence
from mpillm.planning.replica_steps import ReplicaSteps
from mpillm.run import assistant, dispatch, leader, sharing
from mpillm.run.assistant import Assistant
from mpillm.run.dispatch import Dispatcher
from mpillm.run.dispatch_messages import Assigned, Unfinished
from mpillm.run.leader import Given, Leader
from mpillm.run.sharing import Sharing
from mpillm.store.records import Result

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
# Seconds of SmolLM2's steps by the model of the time, on a core of Zen 4.
SMOLLM2 = ReplicaSteps(256, ROWS, [0.005, 0.0063, 0.0084, 0.014, 0.025, 0.048, 0.092, 0.181, 0.357])
# As where every step reads the weights from a disk.
STREAMED = ReplicaSteps(256, ROWS, [0.5] * 7 + [0.6, 1.0])
LATENCY = 0.0005

Times = Callable[
    [float], float
]  # how many times as long as by the model a step takes that begins at this moment


@dataclass
class Simulated:
    """What became of a run: its seconds, and for each replica when it ended and what it has computed."""

    seconds: float = 0.0
    answers: list[str] = field(default_factory=list)
    ended: dict[int, float] = field(default_factory=dict)  # when each replica computed its last step
    totals: dict[int, Totals] = field(default_factory=dict)


class Clock:
    """Virtual time for threads, of which the one with the earliest moment runs."""

    def __init__(self, ranks: int) -> None:
        self.now, self.failed = 0.0, False
        self._until = dict.fromkeys(range(ranks), 0.0)
        self._turn = {rank: threading.Event() for rank in range(ranks)}

    def begin(self, rank: int) -> None:
        if rank == 0:
            self._turn[0].set()
        self._turn[rank].wait()

    def sleep(self, rank: int, until: float) -> None:
        """Let the others run until a moment, or until `wake`."""
        self._until[rank] = until
        self._turn[rank].clear()
        self._next()
        self._turn[rank].wait()
        assert not self.failed, "another rank failed"

    def wake(self, rank: int, at: float) -> None:
        """Let a rank that waits for a message run at a moment."""
        if rank in self._until:
            self._until[rank] = min(self._until[rank], at)

    def end(self, rank: int) -> None:
        del self._until[rank]
        if self._until:
            self._next()

    def _next(self) -> None:
        rank = min(self._until, key=lambda one: (self._until[one], one))
        self.now = max(self.now, self._until[rank])
        self._turn[rank].set()


class Post:
    """The messages that are under way, and who waits for some."""

    def __init__(self, clock: Clock, ranks: int) -> None:
        self.clock = clock
        self.boxes = [deque[tuple[float, int, bytes]]() for _ in range(ranks)]
        self.waiting = set[int]()


class SimulatedMailbox:
    """As `Mailbox`."""

    def __init__(self, world: Any, *_: object) -> None:
        self._post, self._rank = world.post, world.rank

    def send(self, message: bytes, rank: int) -> None:
        arrival = self._post.clock.now + LATENCY
        self._post.boxes[rank].append((arrival, self._rank, message))
        if rank in self._post.waiting:
            self._post.clock.wake(rank, arrival)

    def receive(self) -> tuple[int, bytes] | None:
        box = self._post.boxes[self._rank]
        return box.popleft()[1:] if box and box[0][0] <= self._post.clock.now else None

    def wait(self, seconds: float) -> tuple[int, bytes] | None:
        clock, box = self._post.clock, self._post.boxes[self._rank]
        if (message := self.receive()) is None:
            self._post.waiting.add(self._rank)
            clock.sleep(self._rank, min(clock.now + seconds, *(at for at, _, _ in box), float("inf")))
            self._post.waiting.discard(self._rank)
            message = self.receive()
        return message

    def flush(self, seconds: float) -> None:
        pass


class SimulatedEngine:
    """As `Engine`: it has a real scheduler, and its steps take the time of `steps`, times `times`."""

    def __init__(self, clock: Clock, rank: int, steps: ReplicaSteps, times: Times, limits: Limits) -> None:
        self.totals, self.ended = Totals(), 0.0
        self._clock, self._rank, self._steps, self._times, self._limits = clock, rank, steps, times, limits
        self._scheduler: Scheduler | None = None

    @property
    def unfinished(self) -> list[EngineSequence]:
        return self._scheduler.unfinished if self._scheduler else []

    def withdraw(self, sequences: Iterable[EngineSequence]) -> None:
        assert self._scheduler is not None
        for one in sequences:
            self._scheduler.withdraw(one)

    def unsaved(self, at_least: int = 1) -> Iterator[Any]:
        return iter(())

    def stop(self, exit_code: int) -> None:
        pass

    def run(
        self, requests: Iterable[Request], more: Callable[[], bool]
    ) -> Iterator[list[FinishedCompletion]]:
        self._scheduler = Scheduler(self._limits, NewSequences(requests, self.totals), self.totals)
        while self._scheduler.has_work() or more():
            chosen = self._scheduler.next(1)
            rows, now = sum(count for _, count in chosen), self._clock.now
            self._clock.sleep(self._rank, now + self._times(now) * self._steps.seconds(rows))
            self.totals.steps, self.totals.rows = self.totals.steps + 1, self.totals.rows + rows
            finished = [one for one, count in chosen if self._computed(one, count)]
            for one in finished:
                self._scheduler.release(one)
            self.ended = self._clock.now
            yield [one.completion() for one in finished]

    def _computed(self, one: EngineSequence, count: int) -> bool:
        """Count the tokens of a sequence, and draw one if all others are computed; return whether it was the last."""
        one.in_flight = False
        known = max(one.computed, one.reached)
        self.totals.prompt_tokens += max(min(one.computed + count, len(one.request.prompt)) - known, 0)
        self.totals.recomputed_tokens += min(count, known - one.computed)
        one.computed += count
        one.reached = max(one.reached, one.computed)
        if one.computed == len(one.tokens):
            self.totals.turns += 1
            one.append(1)
            self.totals.count_generated(one)
        return one.finish_reason is not None


def simulated(
    monkeypatch: pytest.MonkeyPatch,
    steps: Sequence[ReplicaSteps],
    times: Sequence[Times],
    shares: Sequence[float],
    lines: int = 320,
    ready: Sequence[float] = (),
    prompt: int = 16,
    answer: Callable[[int], int] = lambda number: 32,
) -> Simulated:
    """Run a job on replicas whose steps take `times` as long as planned, and which are `ready` at these moments.

    `steps` and `shares` are those of the plan; `answer` says how many tokens the answer of a line has.
    """
    ranks, made = len(steps), Simulated()
    clock = Clock(ranks)
    post = Post(clock, ranks)
    virtual = SimpleNamespace(monotonic=lambda: clock.now)
    for module in (assistant, dispatch, leader, sharing):
        monkeypatch.setattr(module, "time", virtual)
    for module in (assistant, dispatch):
        monkeypatch.setattr(module, "Mailbox", SimulatedMailbox)
    monkeypatch.setattr(assistant, "read_line", lambda content, spec: content)
    monkeypatch.setattr(assistant, "make_work", lambda line, *_: work(line))
    monkeypatch.setattr(leader, "results", SimpleNamespace(ended=lambda work, *_: answered(work)))
    limits = Limits(4096, 4096, 256, 512, 1)
    nothing: Any = None

    def work(line: Line) -> Work:
        ids = tuple(line.number * 64 + at for at in range(prompt))
        request = Request(line.custom_id, ids, max_tokens=answer(line.number))
        return Work(line, nothing, (request,), nothing)

    def answered(work: Work) -> Result:
        return Result(work.custom_id, work.line.digest, 200, b"")

    engines = [SimulatedEngine(clock, rank, steps[rank], times[rank], limits) for rank in range(ranks)]

    def session(rank: int) -> Any:
        return SimpleNamespace(
            world=SimpleNamespace(rank=rank, post=post, hosts=("host",) * ranks, size=ranks),
            counters=None,
            arrivals=SimpleNamespace(complete=True, failed=set()),
            replicas=[SimpleNamespace(first=first, ranks=range(first, first + 1)) for first in range(ranks)],
            limits=limits,
            watch=SimpleNamespace(check=lambda: None),
            engine=lambda totals: engines[rank],
        )

    spec: Any = SimpleNamespace(job=SimpleNamespace(checkpoint_tokens=0))

    def keep(record: Any) -> None:
        if isinstance(record, Result):
            made.answers.append(record.custom_id)

    def lead() -> None:
        queue = (Unfinished(Line(n, 0, 2, str(n), bytes(16)), {}) for n in range(1, lines + 1))
        own = Leader(session(0), spec, lambda: nothing, keep)
        dispatcher = Dispatcher(
            session(0),
            own,
            Sharing(steps if ranks > 1 else [], shares),
            queue,
            lines,
            lambda given: Assigned(given.line, b"{}", given.partial),
            keep,
            None,
            lambda: None,
        )

        def following() -> Given | None:
            given = dispatcher.take()
            return (work(given.line), given.partial) if given is not None else None

        def more() -> bool:
            with own.waiting():
                while not dispatcher.done:
                    if dispatcher.has_more:
                        return True
                    dispatcher.wait()
                return False

        dispatcher.serve()
        for finished in own.engine.run(own.requests(following), more):
            for completion in finished:
                if own.take(completion):
                    dispatcher.answered_here()
            dispatcher.serve()
        made.seconds = clock.now
        dispatcher.stop(0)

    def run(rank: int) -> None:
        clock.begin(rank)
        try:
            if rank == 0:
                lead()
                return
            if ready:
                clock.sleep(rank, ready[rank])
            Assistant(session(rank), spec, nothing).run()
        except BaseException:
            clock.failed = True
            raise
        finally:
            clock.end(rank)

    with ThreadPoolExecutor(ranks) as pool:
        for done in [pool.submit(run, rank) for rank in range(ranks)]:
            done.result()
    for rank, engine in enumerate(engines):
        made.totals[rank], made.ended[rank] = engine.totals, engine.ended
    return made
