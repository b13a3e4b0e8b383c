"""How the leader of a replica without rank 0 gets its lines."""

from __future__ import annotations

import contextlib
from collections import deque
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mpillm.batch.work import Line
from mpillm.engine.limits import Totals
from mpillm.run import assistant
from mpillm.run.assistant import Assistant
from mpillm.run.dispatch_messages import (
    TO_RANK_0,
    Assigned,
    AssignedLines,
    GiveBack,
    News,
    NoMoreLines,
    Standing,
)


class FakeMailbox:
    """What has come at once, what comes when there is nothing else to do, and the lines that were asked for."""

    def __init__(self, *_: object) -> None:
        self.come, self.later, self.asked = deque[Any](), deque[Any](), list[int]()

    def receive(self) -> tuple[int, bytes] | None:
        return (0, msgspec.msgpack.encode(self.come.popleft())) if self.come else None

    def wait(self, seconds: float) -> tuple[int, bytes]:
        return 0, msgspec.msgpack.encode(self.later.popleft())

    def send(self, data: bytes, leader: int) -> None:
        message = TO_RANK_0.decode(data)
        if isinstance(message, News) and message.wanted:
            self.asked.append(message.wanted)


def test_lines_that_are_given_back_at_once_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 sends none unasked, and would wait for a leader with the last lines that are its share."""
    leader = SimpleNamespace(
        engine=SimpleNamespace(totals=Totals()),
        standing=lambda waiting: Standing(0, 0, 0.0, waiting, 0, 0, 0.0),
        give_back=lambda count: [],
        waiting=contextlib.nullcontext,
    )
    monkeypatch.setattr(assistant, "Mailbox", FakeMailbox)
    monkeypatch.setattr(assistant, "Leader", lambda *_: leader)
    session: Any = SimpleNamespace(world=None, counters=None, replicas=[])
    nothing: Any = None
    waiting = Assistant(session, nothing, nothing)
    mailbox: Any = waiting._mailbox
    given = [Assigned(Line(number, 0, 2, str(number), bytes(16)), b"{}", {}) for number in (1, 2)]
    mailbox.come += [AssignedLines(given), GiveBack(2)]
    mailbox.later += [AssignedLines(given[:1])]
    assert waiting._more()
    assert len(mailbox.asked) == 1
    assert [one.line.number for one in waiting._lines] == [1]
    waiting._lines.clear()
    mailbox.later += [NoMoreLines(0)]
    assert not waiting._more()
    assert len(mailbox.asked) == 2
