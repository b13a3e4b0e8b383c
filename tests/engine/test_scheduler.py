"""Scheduling: order, chunks, budgets, shared prefixes, preemption; nobody is dropped and blocks come back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from mpillm.engine.scheduler import Limits, Scheduler, blocks_for
from mpillm.engine.sequence import Request, Sequence
from mpillm.kernels import KV_BLOCK

Chosen = list[tuple[Sequence, int]]


def limits(**changes: Any) -> Limits:
    values = {
        "n_blocks": 100,
        "blocks_in_memory": 100,
        "max_sequences": 8,
        "max_tokens": 64,
        "micro_batches": 1,
    }
    return Limits(**{**values, **changes})


_first = itertools.count(1000)


def sequence(name: str, prompt: int, max_tokens: int, shared: int = 0, **more: Any) -> Sequence:
    """A prompt whose first `shared` tokens are those of all others, and whose next one is nobody else's."""
    ids = [*range(shared), next(_first), *range(prompt)][:prompt]
    return Sequence(Request(name, tuple(ids), max_tokens=max_tokens, **more))


class Ranks:
    """Pretends to compute steps: every block must hold what the sequence believes it does."""

    def __init__(self, made: Iterable[Sequence], **changes: Any) -> None:
        self.limits = limits(**changes)
        self.scheduler = Scheduler(self.limits, iter(made))
        self.finished: list[str] = []
        self.computed: dict[str, list[int]] = {}  # positions, in order
        self.fresh = 0  # rows that were computed for the first time, and not shared before
        self._held: dict[tuple[int, int], tuple[int, ...]] = {}  # by block and offset: all tokens up to there
        self._in_flight: list[Chosen] = []

    def run(self) -> Iterator[Chosen]:
        """Yields every step as it is sent."""
        scheduler = self.scheduler
        while scheduler.has_work:
            while len(self._in_flight) < self.limits.micro_batches and (
                chosen := scheduler.next(self.limits.micro_batches)
            ):
                self._compute(chosen)
                self._in_flight.append(chosen)
                yield chosen
            self._finish(self._in_flight.pop(0))
        assert scheduler.blocks_in_use == 0

    def _compute(self, chosen: Chosen) -> None:
        assert sum(count for _, count in chosen) <= self.limits.max_tokens
        assert len(chosen) <= self.limits.max_sequences
        assert len({one.request.id for one, _ in chosen}) == len(chosen)
        before = dict(self._held)
        for one, count in chosen:
            end = one.computed + count
            assert len(one.blocks) == blocks_for(end) == len(set(one.blocks))
            for position in range(one.computed):
                # Of what other sequences have computed, nothing is from this very step.
                assert before[_place(one, position)] == tuple(one.tokens[: position + 1])
            for position in range(one.computed, end):
                self._held[_place(one, position)] = tuple(one.tokens[: position + 1])
            self.computed.setdefault(one.request.id, []).extend(range(one.computed, end))
            self.fresh += max(0, end - max(one.computed, one.reached))
        for one, count in chosen:  # that no two sequences wrote into one block
            for position in range(one.computed, one.computed + count):
                assert self._held[_place(one, position)] == tuple(one.tokens[: position + 1])

    def _finish(self, chosen: Chosen) -> None:
        for one, count in chosen:
            one.in_flight = False
            one.computed += count
            one.reached = max(one.reached, one.computed)
            if one.computed == len(one.tokens):
                if one.request.only_reads:
                    one.finish_reason = "length"
                else:
                    one.append(one.generated)
            if one.finish_reason:
                self.scheduler.release(one)
                self.finished.append(one.request.id)


def _place(one: Sequence, position: int) -> tuple[int, int]:
    return one.blocks[position // KV_BLOCK], position % KV_BLOCK


def steps_of(ranks: Ranks) -> list[list[tuple[str, int]]]:
    return [[(one.request.id, count) for one, count in chosen] for chosen in ranks.run()]


def test_long_prompts_are_cut_and_decoding_goes_first() -> None:
    steps = steps_of(Ranks([sequence("long", 150, 3), sequence("short", 10, 3)]))
    assert steps == [
        [("long", 64)],
        [("long", 64)],
        [("long", 22), ("short", 10)],
        [("long", 1), ("short", 1)],
        [("long", 1), ("short", 1)],
    ]
    late = steps_of(Ranks([sequence("short", 10, 3), sequence("long", 150, 1), sequence("more", 5, 2)]))
    assert late[:3] == [
        [("short", 10), ("long", 54)],
        [("short", 1), ("long", 63)],
        [("short", 1), ("long", 33), ("more", 5)],
    ]


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("n_blocks", [8, 20, 200])
def test_everybody_finishes_and_every_block_comes_back(
    micro_batches: int, n_blocks: int, prefix_sharing: bool
) -> None:
    rng = np.random.default_rng(n_blocks * 10 + micro_batches)
    names = [str(i) for i in range(60)]
    kinds: list[dict[str, Any]] = [{}, {"prompt_logprobs": 0}, {"kind": "embed"}]
    made = [
        sequence(
            name,
            int(rng.integers(1, 130)),
            int(rng.integers(0, 120)),
            shared=int(rng.choice([0, 40, 96])),
            **kinds[int(rng.integers(3))],
        )
        for name in names
    ]
    ranks = Ranks(made, n_blocks=n_blocks, micro_batches=micro_batches, prefix_sharing=prefix_sharing)
    for _ in ranks.run():
        assert ranks.scheduler.blocks_in_use <= n_blocks
    assert sorted(ranks.finished) == sorted(names)
    totals = ranks.scheduler.totals
    if n_blocks != 20:
        assert (totals.preemptions > 0) is (n_blocks == 8)
    assert (totals.shared_tokens > 0) is prefix_sharing
    for one in made:
        if one.request.needs_all_rows:
            assert set(range(len(one.request.prompt))) <= set(ranks.computed[one.request.id])
    assert ranks.fresh + totals.shared_tokens == sum(one.request.max_length or 1 for one in made)


def test_a_prefix_is_computed_once_and_followers_wait_for_it() -> None:
    # 96 shared tokens are three blocks: they, and what follows them in the first prompt, are computed once.
    steps = steps_of(Ranks([sequence(name, 100, 1, shared=96) for name in "abcde"]))
    assert steps == [
        [("a", 64)],
        [("a", 36)],
        [("b", 4), ("c", 4), ("d", 4), ("e", 4)],
    ]
    # Who does not share it need not wait.
    steps = steps_of(Ranks([sequence(name, 40, 1, shared=32 * (name < "c")) for name in "abc"]))
    assert steps == [[("a", 40), ("c", 24)], [("b", 8), ("c", 16)]]


def test_the_last_token_is_computed_though_its_block_is_there() -> None:
    ranks = Ranks(Sequence(Request(name, tuple(range(64)), max_tokens=2)) for name in "ab")
    assert steps_of(ranks) == [[("a", 64)], [("a", 1), ("b", 32)], [("b", 1)]]
    assert ranks.scheduler.totals.shared_tokens == 32


def test_what_needs_all_rows_shares_nothing_but_is_shared() -> None:
    made = [
        sequence("scored", 64, 0, shared=64, prompt_logprobs=0),
        sequence("pooled", 64, 0, shared=64, kind="embed", pooling="mean"),
        sequence("last", 65, 0, shared=64, kind="embed", pooling="last"),
    ]
    ranks = Ranks(made, max_tokens=500)
    # The longest first, for all of these only read.
    assert steps_of(ranks) == [[("last", 65), ("scored", 64), ("pooled", 64)]]
    again = Ranks(
        [
            sequence("first", 70, 1, shared=64),
            *(sequence(s.request.id, 64, 0, shared=64, prompt_logprobs=0) for s in made),
        ],
        max_tokens=500,
    )
    assert steps_of(again)[0][1:] == [(s.request.id, 64) for s in made]


def test_the_youngest_gives_way_and_the_oldest_never_does() -> None:
    # Four blocks; each of two sequences comes to need three.
    ranks = Ranks([sequence("old", 30, 60), sequence("young", 30, 60)], n_blocks=4)
    steps = steps_of(ranks)
    assert ranks.finished == ["old", "young"]
    assert ranks.scheduler.totals.preemptions == 1
    assert ranks.computed["old"] == list(range(89))
    assert ranks.computed["young"] != list(range(89))
    assert set(ranks.computed["young"]) == set(range(89))
    assert all(step[0][0] == "old" for step in steps[: 60 - 1])


def test_nobody_is_admitted_whom_the_next_tokens_of_the_others_would_push_out() -> None:
    ranks = Ranks([sequence(name, 64, 20) for name in "abc"], n_blocks=7)
    first = next(iter(ranks.run()))
    assert [one.request.id for one, _ in first] == ["a"]
    assert [one.request.id for one in ranks.scheduler.running] == ["a", "b"]


def test_no_block_is_kept_for_who_will_not_need_one() -> None:
    # All of a sequence's 64 tokens have room in two blocks: as many run as there are pairs.
    ranks = Ranks([sequence(str(i), 40, 25) for i in range(9)], n_blocks=16, max_sequences=9, max_tokens=500)
    assert [len(step) for step in ranks.run()][:2] == [8, 8]
    assert ranks.scheduler.totals.preemptions == 0


def test_readers_go_longest_first_within_a_window() -> None:
    lengths = [3, 9, 5, 7, 8, 2]
    made = [sequence(str(n), n, 0, prompt_logprobs=0) for n in lengths]
    made.insert(1, sequence("generates", 4, 1))
    taken: list[str] = []

    def stream() -> Iterator[Sequence]:
        for one in made:
            taken.append(one.request.id)
            yield one

    scheduler = Scheduler(limits(max_sequences=4, max_tokens=9), stream())
    assert taken == ["3", "generates"]  # who generates goes on as it comes
    order = []
    while scheduler.has_work:
        for one, count in scheduler.next(1):
            one.in_flight = False
            one.computed += count
            if one.computed == len(one.tokens):
                order.append(one.request.id)
                scheduler.release(one)
    assert order == ["generates", "9", "7", "5", "3", "8", "2"]


def test_micro_batches_share_the_sequences() -> None:
    scheduler = Scheduler(limits(micro_batches=2), (sequence(str(i), 4, 9) for i in range(6)))
    first, second = scheduler.next(2), scheduler.next(2)
    assert [one.request.id for one, _ in first] == ["0", "1", "2"]
    assert [one.request.id for one, _ in second] == ["3", "4", "5"]
    assert scheduler.next(2) == []


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (1, KV_BLOCK, KV_BLOCK + 1)] == [1, 1, 2]
