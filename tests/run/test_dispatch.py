"""How rank 0 hands out lines: what the other leaders get, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mpillm.batch.work import Line
from mpillm.run import dispatch
from mpillm.run.dispatch import Dispatcher
from mpillm.run.dispatch_messages import FROM_RANK_0, Assigned, Unfinished
from mpillm.run.sharing import Sharing


class FakeMailbox:
    """Nothing comes, and what is sent is kept."""

    def __init__(self, *_: object) -> None:
        self.sent: list[tuple[int, int]] = []  # leader, lines

    def receive(self) -> None:
        return None

    def send(self, data: bytes, leader: int) -> None:
        self.sent.append((leader, len(FROM_RANK_0.decode(data).lines)))


@pytest.mark.parametrize(
    ("lines", "at_once", "given"), [(32, 256, 16), (33, 256, 17), (32, 4, 4), (9000, 1024, 256), (0, 4, 0)]
)
def test_the_first_lines_come_unasked(
    lines: int, at_once: int, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their share, as far as it can be computed at once, before rank 0's first step."""
    monkeypatch.setattr(dispatch, "Mailbox", FakeMailbox)
    session: Any = SimpleNamespace(
        world=SimpleNamespace(hosts=("a", "b"), size=2),
        counters=None,
        arrivals=SimpleNamespace(complete=True),
        replicas=[SimpleNamespace(first=0), SimpleNamespace(first=1)],
        limits=SimpleNamespace(max_sequences=at_once, micro_batches=1),
    )
    queue = [Unfinished(Line(number, 0, 2, str(number), bytes(16)), {}) for number in range(1, lines + 1)]
    leader: Any = None
    dispatcher = Dispatcher(
        session,
        leader,
        Sharing([], [0.5, 0.5]),
        iter(queue),
        lines,
        lambda given: Assigned(given.line, b"{}", {}),
        lambda record: None,
        None,
        lambda: None,
    )
    dispatcher.serve()
    sent = dispatcher._mailbox.sent  # type: ignore[attr-defined]
    assert sent == ([(1, given)] if given else [])
