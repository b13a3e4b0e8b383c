"""The queue between clients and the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpillm.serve import arrivals
from mpillm.serve.arrivals import Arrivals, Full, Ticket
from tests.job_helpers import works


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
