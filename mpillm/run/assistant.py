"""The leader of a replica without rank 0: it computes lines that rank 0 sends, and sends the records back.

Rank 0 sends the first lines without a request. The leader asks for more when its scheduler has room for them, and sends
the records of its answers after each step.
"""

from __future__ import annotations

import pickle
import time
from collections import deque

import msgspec

from mpillm.batch.requests import make_work, read_line
from mpillm.batch.work import Model
from mpillm.comm.mailbox import Mailbox
from mpillm.errors import MpillmError
from mpillm.run.balance import AGAIN, Teller, is_failure, watched
from mpillm.run.dispatch_messages import (
    FROM_RANK_0,
    LOOK_EVERY,
    MANY,
    PARTING,
    AnswerRecord,
    Assigned,
    GiveBack,
    GivenBack,
    Left,
    News,
    NoMoreLines,
    Unfinished,
)
from mpillm.run.leader import Given, Leader
from mpillm.run.session import Session
from mpillm.spec import Spec
from mpillm.weights.identity import ModelChangedError

FEW = 4  # lines in a leader's first request
TELL_EVERY = 0.5  # seconds after which a leader reports its progress even if no line is finished


class Assistant:
    """Computes lines for rank 0 on the ranks of one replica."""

    def __init__(self, session: Session, spec: Spec, model: Model) -> None:
        """`model` has the tokenizer, which is loaded while rank 0 opens the job."""
        self._session, self._spec, self._model = session, spec, model
        self._mailbox = Mailbox(session.world, session.counters)
        self._records: list[AnswerRecord] = []
        self._leader = Leader(session, spec, lambda: model, self._records.append)
        self._lines: deque[Assigned] = deque()
        self._ask, self._asked = FEW, True  # rank 0 sends the first lines without a request
        self._told = time.monotonic()
        self._teller = Teller(session) if watched(session) else None
        self._stop: NoMoreLines | None = None

    def run(self) -> int:
        """Compute lines until rank 0 sends `NoMoreLines`; return its exit code."""
        engine, watch = self._leader.engine, self._session.watch
        try:
            for finished in engine.run(self._leader.requests(self._next), self._more):
                for completion in finished:
                    self._leader.take(completion)
                self._leader.save()
                watch.check()
                self._serve()
                if self._teller is not None:
                    self._teller.tell()
                if self._stop is not None:
                    break
            assert self._stop is not None
            self._part(self._stop.exit_code)
        except MpillmError as error:
            self._part(error.exit_code, error)
            raise
        return self._stop.exit_code

    def _part(self, exit_code: int, error: MpillmError | None = None) -> None:
        """Send the remaining records, and stop the other ranks of this replica."""
        keep = exit_code == AGAIN or (exit_code and self._spec.job.checkpoint_tokens)
        if keep and not isinstance(error, ModelChangedError):
            self._leader.save_everything()
        self._tell(0)
        self._mailbox.send(msgspec.msgpack.encode(Left(pickle.dumps(error) if error else b"")), 0)
        self._leader.engine.stop(exit_code)
        self._mailbox.flush(PARTING if is_failure(exit_code) else float("inf"))
        if self._teller is not None and not is_failure(exit_code):
            self._teller.end()

    def _ask_for_more(self) -> None:
        """Ask rank 0 for lines if few are left, unless it was asked already."""
        if len(self._lines) <= self._ask // 2 and not self._asked:
            if not self._lines:
                self._ask = min(2 * self._ask, MANY)  # the scheduler takes lines faster than they arrive
            self._asked = True
            self._tell(self._ask)

    def _next(self) -> Given | None:
        self._ask_for_more()
        if not self._lines:
            return None
        given = self._lines.popleft()
        content = read_line(given.content, self._spec)
        return make_work(given.line, content, self._spec, self._model), given.partial

    def _more(self) -> bool:
        """Wait for a line when nothing is left to compute; return False if no more will come."""
        self._serve()
        with self._leader.waiting():
            while not self._lines and self._stop is None:
                self._ask_for_more()  # lines that came just now may have been given back at once
                if (message := self._mailbox.wait(LOOK_EVERY)) is not None:
                    self._take(message[1])
                self._tell_if_due()
        return self._stop is None

    def _serve(self) -> None:
        while (message := self._mailbox.receive()) is not None:
            self._take(message[1])
        self._tell_if_due()

    def _take(self, data: bytes) -> None:
        message = FROM_RANK_0.decode(data)
        if isinstance(message, NoMoreLines):
            self._stop = message
        elif isinstance(message, GiveBack):
            self._give_back(message.count)
        else:
            self._lines.extend(message.lines)
            self._asked = False

    def _give_back(self, count: int) -> None:
        """Return up to `count` lines to rank 0: first those that have not begun, the last ones first, then others."""
        waiting = [self._lines.pop() for _ in range(min(count, len(self._lines)))]
        lines = [Unfinished(one.line, one.partial) for one in waiting]
        lines += self._leader.give_back(count - len(lines))
        self._tell(0)  # the lines' records must arrive before the lines
        self._mailbox.send(msgspec.msgpack.encode(GivenBack(lines)), 0)

    def _tell_if_due(self) -> None:
        if self._records or time.monotonic() > self._told + TELL_EVERY:
            self._tell(0)

    def _tell(self, wanted: int) -> None:
        standing = self._leader.standing(len(self._lines))
        news = News(self._records, self._leader.engine.totals, standing, wanted)
        self._mailbox.send(msgspec.msgpack.encode(news), 0)
        self._records.clear()
        self._told = time.monotonic()
