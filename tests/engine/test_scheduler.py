"""Scheduling: order, chunks, budgets; nobody is dropped and blocks come back."""

from __future__ import annotations

import numpy as np
import pytest

from mpillm.engine.scheduler import Limits, Scheduler, blocks_for
from mpillm.engine.sequence import Request, Sequence
from mpillm.kernels import KV_BLOCK


def limits(**changes: int) -> Limits:
    values = {"n_blocks": 100, "max_sequences": 8, "max_tokens": 64, "micro_batches": 1}
    return Limits(**{**values, **changes})


def sequence(name: str, prompt: int, max_tokens: int) -> Sequence:
    return Sequence(Request(name, tuple(range(prompt)), max_tokens=max_tokens))


def compute(scheduler: Scheduler, chosen: list[tuple[Sequence, int]]) -> list[str]:
    """Pretend that a step was computed; the names of what finished."""
    finished = []
    for one, count in chosen:
        one.in_flight = False
        one.computed += count
        if one.computed == len(one.tokens):
            one.append(0)
        if one.finish_reason:
            scheduler.release(one)
            finished.append(one.request.id)
    return finished


def test_long_prompts_are_cut_and_decoding_goes_first() -> None:
    scheduler = Scheduler(limits(), iter([sequence("long", 150, 3), sequence("short", 10, 3)]))
    counts = []
    while scheduler.has_work:
        chosen = scheduler.next()
        counts.append([(one.request.id, count) for one, count in chosen])
        compute(scheduler, chosen)
    assert counts[0] == [("long", 64)]
    assert counts[1] == [("long", 64)]
    assert counts[2] == [("long", 22), ("short", 10)]
    assert counts[3] == [("long", 1), ("short", 1)]
    assert all(sum(count for _, count in step) <= 64 for step in counts)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("n_blocks", [9, 20, 200])
def test_everybody_finishes_and_every_block_comes_back(micro_batches: int, n_blocks: int) -> None:
    rng = np.random.default_rng(n_blocks * 10 + micro_batches)
    names = [str(i) for i in range(40)]
    made = [sequence(name, int(rng.integers(1, 200)), int(rng.integers(1, 30))) for name in names]
    scheduler = Scheduler(limits(n_blocks=n_blocks, micro_batches=micro_batches), iter(made))
    finished: list[str] = []
    in_flight: list[list[tuple[Sequence, int]]] = []
    while scheduler.has_work:
        while len(in_flight) < micro_batches and (chosen := scheduler.next()):
            in_flight.append(chosen)
        held = [block for one in scheduler.running for block in one.blocks]
        assert len(set(held)) == len(held) <= n_blocks
        finished += compute(scheduler, in_flight.pop(0))
    assert sorted(finished) == sorted(names)
    assert scheduler.blocks_in_use == 0


def test_micro_batches_share_the_sequences() -> None:
    scheduler = Scheduler(limits(micro_batches=2), (sequence(str(i), 4, 9) for i in range(6)))
    first, second = scheduler.next(), scheduler.next()
    assert [one.request.id for one, _ in first] == ["0", "1", "2"]
    assert [one.request.id for one, _ in second] == ["3", "4", "5"]
    assert scheduler.next() == []


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (1, KV_BLOCK, KV_BLOCK + 1)] == [1, 1, 2]
