"""The queue between clients and the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from mpillm.serve import arrivals
from mpillm.serve.arrivals import Arrivals, Full, Ticket
from mpillm.serve.batch_run import BatchRun
from mpillm.store.journal import Journal
from mpillm.store.output import Claim
from mpillm.store.records import Done
from tests.job_helpers import WITH_TEXT, checked, completion, works


def test_what_waits_is_bounded_in_requests_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "WAITING_TOKENS", 10)
    (work,) = works(tmp_path, {"prompt": [5] * 8, "max_tokens": 1, "n": 3})
    queue = Arrivals(capacity=3, background=0)

    def submit() -> None:
        queue.submit(Ticket(work, lambda _: None))

    submit()
    with pytest.raises(Full, match=r"The queue is full \(8 tokens\); try again later"):
        submit()
    assert [len(next(queue).prompt) for _ in range(3)] == [8, 8, 8]
    submit()  # the first one does not wait any more
    monkeypatch.setattr(arrivals, "WAITING_TOKENS", 1000)
    submit()
    submit()
    with pytest.raises(Full, match=r"The queue is full \(3 requests\)"):
        submit()


class Kept(list[Any]):
    """The journal of a batch, in memory."""

    done: ClassVar[Any] = Done()
    counts = ()  # of earlier starts

    def flush(self) -> None:
        """There is no disk."""

    commit = flush


def test_a_cancelled_batch_ends_with_the_next_token_and_has_no_half_answers(tmp_path: Path) -> None:
    batch = checked(tmp_path, [{"prompt": [5, 6], "max_tokens": 100}] * 3)
    journal, ends = Kept(), []
    added: list[Iterator[Ticket]] = []
    run = BatchRun(batch, Claim(tmp_path / "run"), lambda *_: cast("Journal", journal), WITH_TEXT)
    run.begin(added.append, lambda: ends.append("end"))
    (tickets,) = added
    first, second = next(tickets), next(tickets)
    (whole,), (half,) = first.requests(), second.requests()
    first.take(completion(whole, [7] * 100))
    assert half.watch is not None
    assert not half.watch(7)
    run.cancel()
    assert half.watch(7), "it ends with this token"
    assert (list(tickets), ends) == ([], [])
    second.take(completion(half, [7, 7]))
    run.commit()
    assert ends == ["end"]
    assert len(journal) == 1


def test_a_cancelled_batch_that_waits_behind_another_ends_at_once(tmp_path: Path) -> None:
    batch = checked(tmp_path, [{"prompt": [5, 6], "max_tokens": 100}] * 3)
    journal, ends = Kept(), []
    added: list[Iterator[Ticket]] = []
    run = BatchRun(batch, Claim(tmp_path / "run"), lambda *_: cast("Journal", journal), WITH_TEXT)
    run.begin(added.append, lambda: ends.append("end"))
    (tickets,) = added
    run.commit()
    assert ends == []
    run.cancel()
    run.commit()
    assert (ends, list(tickets), ends) == (["end"], [], ["end"])


def test_a_batch_does_not_end_with_the_server(tmp_path: Path) -> None:
    batch = checked(tmp_path, [{"prompt": [5, 6], "max_tokens": 100}] * 3)
    journal, ends = Kept(), []
    added: list[Iterator[Ticket]] = []
    run = BatchRun(batch, Claim(tmp_path / "run"), lambda *_: cast("Journal", journal), WITH_TEXT)
    run.begin(added.append, lambda: ends.append("end"))
    for ticket in list(added[0]):
        ticket.cancel()
        ticket.fail()
    run.commit()
    assert (ends, journal) == ([], [])
