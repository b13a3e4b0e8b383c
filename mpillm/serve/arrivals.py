"""Requests that come while the engine runs: from any thread in, to the thread of the engine, and back.

The engine takes requests from `Arrivals` when it has capacity for them; a request that waits can be withdrawn, and one
that runs ends with its next token.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from mpillm.batch.pending import Pending
from mpillm.batch.work import Work
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.errors import MpillmError
from mpillm.words import count_of

WAITING_TOKENS = 1 << 20  # the maximum tokens of prompts that wait: about 60 bytes each
LOOK = 0.2  # seconds between two looks at whether a signal has come


class Full(MpillmError):
    """The queue of requests is full; no more are taken."""


class Closed(MpillmError):
    """The server ends and takes no more requests."""


class Ticket:
    """One request of a client, from its arrival to its answer. `done` and `token` are called by the engine's thread."""

    def __init__(
        self,
        work: Work,
        done: Callable[[list[FinishedCompletion] | None], object],
        token: Callable[[int, int], object] | None = None,
    ) -> None:
        """`done` gets the completions of `work.requests`, or None if there will be none; `token` each choice and id."""
        self.work = work
        self.tokens = sum({id(one.prompt): len(one.prompt) for one in work.requests}.values())
        self.cancelled = False
        self.generated = 0  # tokens of all choices
        self._done, self._token = done, token
        self._pending: Pending | None = Pending(work)  # None once it is done

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.cancelled = True

    def requests(self) -> Iterator[Request]:
        """Yield the engine's requests."""
        for request in self.work.requests:
            yield replace(request, watch=self._watch(request.choice, request.watch))

    def _watch(self, choice: int, stops: Callable[[int], bool] | None) -> Callable[[int], bool]:
        def watch(token: int) -> bool:
            self.generated += 1
            if self._token is not None:
                self._token(choice, token)
            return (stops is not None and stops(token)) or self.cancelled

        return watch

    def take(self, completion: FinishedCompletion) -> None:
        """Keep a choice; the last one completes the answer."""
        if self._pending is not None and (completions := self._pending.take(completion)) is not None:
            self._pending = None
            self._done(completions)

    def fail(self) -> None:
        """There will be no answer."""
        if self._pending is not None:
            self._pending = None  # what still comes is too late
            self._done(None)


class Arrivals:
    """The queue between clients and the engine; an iterator that goes on after it has ended."""

    def __init__(self, capacity: int, background: int) -> None:
        """At most `capacity` requests with WAITING_TOKENS wait; at most `background` choices of the background run."""
        self._capacity, self._background_limit = capacity, background
        self._background: deque[Iterator[Ticket]] = deque()
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._tokens = 0  # the tokens of the prompts that wait
        self._running: dict[int, tuple[Ticket, Request]] = {}  # by the identity of the engine's request
        self._ticket: Ticket | None = None  # the ticket whose choices are being taken
        self._choices: Iterator[Request] = iter(())
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken."""
        return self._closed

    @property
    def waiting(self) -> int:
        """Requests that the engine has not taken."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Choices that the engine computes."""
        return len(self._running)

    def submit(self, ticket: Ticket) -> None:
        """Let a request wait for its turn; Full or Closed if it cannot."""
        with self._changed:
            if self._closed:
                raise Closed("The server is shutting down.")
            if len(self._waiting) >= self._capacity:
                raise Full(f"The queue is full ({count_of(self._capacity, 'request')}); try again later.")
            if self._waiting and self._tokens + ticket.tokens > WAITING_TOKENS:
                raise Full(f"The queue is full ({count_of(self._tokens, 'token')}); try again later.")
            self._waiting.append(ticket)
            self._tokens += ticket.tokens
            self._changed.notify()

    def add_background(self, tickets: Iterator[Ticket]) -> None:
        """Let these requests run where no other one waits; the engine's thread takes them one by one."""
        with self._changed:
            self._background.append(tickets)
            self._changed.notify()

    def close(self) -> None:
        """Take no more, and give up what waits or runs."""
        with self._changed:
            self._closed = True
            left = {id(ticket): ticket for ticket in self._waiting}
            left |= {id(ticket): ticket for ticket, _ in self._running.values()}
            self._waiting.clear()
            self._tokens = 0
            self._background.clear()
            self._changed.notify()
        for ticket in left.values():
            ticket.cancel()
            ticket.fail()

    # What follows is for the engine's thread.

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        """The next request, if there is one now."""
        while True:
            if self._ticket is not None:
                for request in self._choices:
                    if self._ticket.cancelled:
                        self._ticket.fail()
                        break
                    self._running[id(request)] = self._ticket, request
                    return request
            self._ticket = self._take_ticket()
            if self._ticket is None:
                raise StopIteration
            self._choices = self._ticket.requests()

    def _take_ticket(self) -> Ticket | None:
        """Return the next request: one of those that wait, or one of the background."""
        while True:
            with self._changed:
                if self._waiting:
                    ticket = self._waiting.popleft()
                    self._tokens -= ticket.tokens
                    return ticket
                if not self._background or len(self._running) >= self._background_limit:
                    return None
                tickets = self._background[0]
            if (behind := next(tickets, None)) is not None:
                return behind
            with self._changed, contextlib.suppress(ValueError):  # closed meanwhile
                self._background.remove(tickets)

    def more(self, look: Callable[[], object] | None = None) -> bool:
        """Wait until a request is there; False once the queue is closed. `look` is called every now and then."""
        while True:
            with self._changed:
                if not (self._waiting or self._background or self._closed):
                    self._changed.wait(LOOK)
                if self._closed:
                    return False
                if self._waiting or self._background:
                    return True
            if look is not None:
                look()

    def take(self, completion: FinishedCompletion) -> None:
        """Hand a finished choice to the request that it belongs to."""
        ticket, _ = self._running.pop(id(completion.request))
        ticket.take(completion)
