"""Micro-batches follow what bounds a step, computing or the disk, whoever has the disk."""

from __future__ import annotations

from typing import Any

import pytest

from mpillm.engine.limits import Limits
from mpillm.engine.pace import Pace


def pace(stages: int, **more: Any) -> Pace:
    return Pace(
        Limits(
            n_blocks=9,
            blocks_in_memory=9,
            max_sequences=9,
            max_tokens=9,
            micro_batches=stages,
            **{"streams": True, **more},
        )
    )


def round_time(stages: int, micro_batches: int, compute: float, reading: float) -> float:
    return stages * max(compute / micro_batches, reading)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("compute", [0.05, 0.3, 0.9, 1.1, 2.5, 4.5, 10.0, 40.0])
@pytest.mark.parametrize("stages", [2, 4])
def test_it_finds_what_is_fast(stages: int, compute: float, shared: bool) -> None:
    """By the model of the module's docstring, in units of an undisturbed pass: less than twice the best round."""
    reading = {m: float(m if shared else 1) for m in range(1, stages + 1)}
    times = {m: round_time(stages, m, compute, reading[m]) for m in reading}
    paced, seen = pace(stages), []
    for _ in range(40):
        m = paced.micro_batches
        seconds = max(compute / m, reading[m])
        paced.adapt(seconds, seconds - compute / m, reading[m])
        seen.append(paced.micro_batches)
    settled = seen[20:]
    assert max(times[m] for m in settled) < 2 * min(times.values())
    if compute < 0.5:
        assert set(settled) == {1}  # what only waits for its disk reads each layer once a round
    if compute >= 10 * (stages if shared else 1):
        assert set(settled) == {stages}


def test_nothing_streamed_keeps_all_stages_busy() -> None:
    paced = pace(4, streams=False)

    class Waiting:
        paging = (0.0, 0.0)

    for _ in range(5):
        with paced.measured(Waiting()):
            Waiting.paging = (Waiting.paging[0] + 1e6, 0.0)
        assert paced.micro_batches == 4


def test_it_measures_steps() -> None:
    class Worker:
        paging = (0.0, 0.0)

    paced, worker = pace(2), Worker()
    with paced.measured(worker):
        worker.paging = (1e3, 1e3)  # more seconds than the block takes
    assert paced.micro_batches == 1
    with paced.measured(worker):
        pass
    assert paced.micro_batches == 2
