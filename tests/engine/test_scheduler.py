"""Scheduling: order, chunks, budgets, shared prefixes, preemption; nobody is dropped and blocks come back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mpillm.engine.request import Request
from mpillm.engine.scheduler import Scheduler
from mpillm.engine.sequence import Sequence
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_for, blocks_needed, window_blocks
from tests.engine.scheduling import Drafts, Ranks, limits, name_of, questions, sequence, steps_of, various


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
@pytest.mark.parametrize(
    ("windows", "n_blocks"),
    [
        *(((0,), n_blocks) for n_blocks in (8, 20, 200)),
        *(((0, 33), n_blocks) for n_blocks in (11, 200)),
        *(((0, 1, 70), n_blocks) for n_blocks in (13, 300)),
        *(((40,), n_blocks) for n_blocks in (3, 100)),
        *(((9, 64), n_blocks) for n_blocks in (5, 200)),
    ],
)
def test_everybody_finishes_and_every_block_comes_back(
    windows: tuple[int, ...], n_blocks: int, micro_batches: int, prefix_sharing: bool
) -> None:
    made = various(60 if windows == (0,) else 32, n_blocks * 10 + micro_batches)
    job = {"n_blocks": n_blocks, "micro_batches": micro_batches, "prefix_sharing": prefix_sharing}
    ranks = Ranks(made, windows=windows, **job)
    for _ in ranks.run():
        assert ranks.scheduler.blocks_in_use <= n_blocks
    assert sorted(ranks.finished) == sorted(one.request.id for one in made)
    totals = ranks.scheduler.totals
    if n_blocks != 20 and 0 in windows:
        assert (totals.preemptions > 0) is (n_blocks < 20)
    assert prefix_sharing or not totals.shared_tokens
    if prefix_sharing and (windows == (0,) or n_blocks >= 100):
        assert totals.shared_tokens > 0
    for one in made:
        if one.request.needs_all_rows:
            assert set(range(len(one.request.prompt))) <= set(ranks.computed[one.request.id])
    assert ranks.fresh + totals.shared_tokens == sum(one.request.max_length or 1 for one in made)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("n_blocks", [2, 10, 40])
def test_whole_prompts_are_computed_in_one_step(n_blocks: int, micro_batches: int) -> None:
    """Of any length up to a step's, some of one token; nobody shares a prefix, and nobody waits for ever."""
    rng = np.random.default_rng(n_blocks)
    lengths = [64, *rng.choice([1, 2, 31, 32, 33, 63, 64], 40).tolist(), 64]
    made = [sequence(str(i), length, 0, shared=48, kind="embed") for i, length in enumerate(lengths)]
    ranks = Ranks(made, windows=(0,), n_blocks=n_blocks, micro_batches=micro_batches, whole_prompts=True)
    maximum = 0
    for chosen in ranks.run():
        assert all(count == len(one.request.prompt) for one, count in chosen)
        maximum = max(maximum, len(chosen))
    assert sorted(ranks.finished) == sorted(one.request.id for one in made)
    totals = ranks.scheduler.totals
    assert (totals.preemptions, totals.shared_tokens) == (0, 0)
    assert maximum > 1 or n_blocks == 2


@pytest.mark.parametrize(("windows", "n_blocks"), [((0,), 8), ((0,), 200), ((), 0), ((0, 33), 11)])
@pytest.mark.parametrize("n_slots", [1, 3, 100])
def test_every_sequence_has_a_slot_for_its_states(
    windows: tuple[int, ...], n_blocks: int, n_slots: int
) -> None:
    made = various(20, n_slots)
    ranks = Ranks(made, windows=windows, n_blocks=n_blocks, n_slots=n_slots, micro_batches=2)
    for _ in ranks.run():
        assert len(ranks.scheduler.running) <= n_slots
    assert sorted(ranks.finished) == sorted(one.request.id for one in made)
    totals = ranks.scheduler.totals
    assert totals.shared_tokens == 0  # for no state is kept of where a prefix ends
    assert (totals.preemptions > 0) is (n_slots > 1 and 0 < n_blocks < 20)
    # Whoever was preempted began at the first token again.
    again = [np.flatnonzero(np.diff(positions) != 1).size for positions in ranks.computed.values()]
    assert sum(again) == totals.preemptions - sum(not one.request.max_length for one in made)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    ("windows", "n_blocks"), [((0,), 9), ((0,), 200), ((), 0), ((0, 33), 14), ((40,), 100)]
)
@pytest.mark.parametrize(("n_slots", "n_saved"), [(2, 1), (4, 2), (20, 5)])
def test_states_are_saved_where_prefixes_end(
    windows: tuple[int, ...], n_blocks: int, n_slots: int, n_saved: int, micro_batches: int
) -> None:
    """`Ranks` checks that each state which is loaded is the one after the sequence's own tokens."""
    made = various(40, n_slots)
    job = {"n_slots": n_slots, "n_saved": n_saved, "micro_batches": micro_batches}
    ranks = Ranks(made, windows=windows, n_blocks=n_blocks, **job)
    for _ in ranks.run():
        assert len(ranks.scheduler.running) <= n_slots
    assert sorted(ranks.finished) == sorted(one.request.id for one in made)
    totals = ranks.scheduler.totals
    assert ranks.fresh + totals.shared_tokens == sum(one.request.max_length or 1 for one in made)
    if n_blocks in (0, 200):
        assert totals.shared_tokens > 0


def test_the_third_that_begins_alike_goes_on_from_a_saved_state() -> None:
    made = [sequence(name, 100, 2, shared=96) for name in "abcde"]
    ranks = Ranks(made, windows=(), n_blocks=0, n_slots=5, n_saved=1, max_tokens=500)
    assert steps_of(ranks) == [
        [("a", 100), ("b", 96)],
        [("a", 1), ("b", 4), ("c", 4), ("d", 4), ("e", 4)],
        [("b", 1), ("c", 1), ("d", 1), ("e", 1)],
    ]
    # Where none is shared, nothing is saved: no chunk is cut.
    made = [sequence(name, 100, 1) for name in "ab"]
    ranks = Ranks(made, windows=(0,), n_slots=5, n_saved=1, max_tokens=500)
    assert steps_of(ranks) == [[("a", 100), ("b", 100)]]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    ("windows", "n_blocks"), [((0,), 8), ((0,), 200), ((0, 33), 11), ((0, 33), 200), ((40,), 12)]
)
def test_drafts_take_only_what_is_left(windows: tuple[int, ...], n_blocks: int, micro_batches: int) -> None:
    """`Ranks` checks that nobody reads what a rejected draft has left in a block."""
    plain = Ranks(various(32, n_blocks), windows=windows, n_blocks=n_blocks, micro_batches=micro_batches)
    without = len(steps_of(plain))
    made, drafts = various(32, n_blocks), Drafts(n_blocks)
    ranks = Ranks(made, drafts, windows=windows, n_blocks=n_blocks, micro_batches=micro_batches)
    steps = 0
    for _ in ranks.run():
        steps += 1
        assert ranks.scheduler.blocks_in_use <= n_blocks
    assert sorted(ranks.finished) == sorted(one.request.id for one in made)
    assert drafts.drafted > 100
    assert steps < without
    totals = ranks.scheduler.totals
    assert totals.preemptions <= 1.5 * plain.scheduler.totals.preemptions
    if n_blocks == 200:
        assert totals.shared_tokens == plain.scheduler.totals.shared_tokens


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    ("windows", "n_blocks"), [((0,), 9), ((0,), 200), ((0, 33), 17), ((0, 33), 300), ((40,), 100)]
)
@pytest.mark.parametrize("longest", [1, 100])
def test_choices_go_on_in_the_blocks_of_their_prompt(
    windows: tuple[int, ...], n_blocks: int, longest: int, micro_batches: int
) -> None:
    """`Ranks` checks that each row finds the keys of its own tokens before it."""
    made = questions(30, n_blocks + longest, longest)
    job = {"n_blocks": n_blocks, "micro_batches": micro_batches}
    ranks = Ranks(made, windows=windows, **job)
    for _ in ranks.run():
        pass
    assert sorted(ranks.finished) == sorted(map(name_of, made))
    for one in made:  # every row that is scored is there
        scored = range(one.request.score_from - 1, len(one.request.prompt))
        assert set(scored) <= set(ranks.computed[name_of(one)])
    totals = ranks.scheduler.totals
    assert ranks.fresh + totals.shared_tokens == sum(one.request.max_length for one in made)
    prompts = {one.request.id: one.request.score_from for one in made}
    assert n_blocks < 20 or not totals.preemptions
    if n_blocks >= 100 and (longest == 1 or windows == (0,)):
        # Each prompt once, and of each choice its own tokens and the one before them.
        own = sum(len(one.request.prompt) - one.request.score_from + 1 for one in made)
        assert ranks.fresh <= sum(prompts.values()) + own - len(prompts)
    states = Ranks(questions(10, 1, longest), windows=windows, **job, n_slots=20, n_saved=5)
    assert sum(len(chosen) for chosen in states.run()) >= 10
    assert len(states.finished) == len(questions(10, 1, longest))


def test_blocks_behind_a_window_serve_others() -> None:
    """A long sequence takes no more than the window's blocks, and the others run beside it."""
    made = [sequence("long", 2000, 500), *(sequence(str(i), 20, 400) for i in range(3))]
    blocks = 4 * (window_blocks(100) + 1) + 2
    ranks = Ranks(made, n_blocks=blocks, windows=(100,), max_tokens=32)
    for _ in ranks.run():
        for one in ranks.scheduler.running:
            assert len(one.tables[0].blocks) <= window_blocks(100) + 1
    assert ranks.scheduler.totals.preemptions == 0
    # Where half of the layers see all tokens, these need blocks for all of them, and the others none.
    long = sequence("long", 2000, 1)
    needed = blocks_needed(2000, (0, 100))
    assert needed == blocks_for(2000) + window_blocks(100)
    ranks = Ranks([long], n_blocks=needed, windows=(0, 100), max_tokens=64)
    assert sum(count for step in steps_of(ranks) for _, count in step) == 2000


def test_the_longest_sequence() -> None:
    for windows in ((0,), (0, 0), (0, 50), (50, 0, 50)):
        for n_blocks in (7, 8, 31):
            made = limits(n_blocks=n_blocks, windows=windows)
            assert (
                blocks_needed(made.max_length, windows)
                <= n_blocks
                < blocks_needed(made.max_length + 1, windows)
            )
            one = sequence("longest", made.max_length, 1)
            assert len(steps_of(Ranks([one], n_blocks=n_blocks, windows=windows))) > 0
    assert limits(n_blocks=100).max_length == 100 * KV_BLOCK
    assert limits(n_blocks=3, windows=(40,)).max_length == 2**31 - 1


def test_with_windows_a_prefix_is_shared_where_its_end_is_still_there() -> None:
    shared = 5 * KV_BLOCK
    first, second = sequence("first", shared + 1, 1, shared), sequence("second", shared + 9, 1, shared)
    windows = (0, 40)
    ranks = Ranks([first, second], windows=windows, max_tokens=500)
    steps_of(ranks)
    assert ranks.scheduler.totals.shared_tokens == shared
    assert second.tables[1].first == 0  # released
    # The end of the prefix is not to be found once its blocks in the second group were reused: nothing is shared.
    tight = blocks_needed(shared + 3 * KV_BLOCK, windows)
    long = sequence("long", shared + 2 * KV_BLOCK, 20, shared)
    late = sequence("late", shared + 9, 1, shared)
    ranks = Ranks([long, late], windows=windows, max_tokens=KV_BLOCK, n_blocks=tight, max_sequences=1)
    steps_of(ranks)
    assert sorted(ranks.finished) == ["late", "long"]


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
        sequence("last", 65, 0, shared=64, kind="embed", pooling="last"),
        sequence("scored", 64, 0, shared=64, prompt_logprobs=0),
        sequence("pooled", 64, 0, shared=64, kind="embed", pooling="mean"),
    ]
    ranks = Ranks(made, max_tokens=500)
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


def test_micro_batches_share_the_sequences() -> None:
    scheduler = Scheduler(limits(micro_batches=2), (sequence(str(i), 4, 9) for i in range(6)))
    first, second = scheduler.next(2), scheduler.next(2)
    assert [one.request.id for one, _ in first] == ["0", "1", "2"]
    assert [one.request.id for one, _ in second] == ["3", "4", "5"]
    assert scheduler.next(2) == []


def test_an_iterator_that_has_ended_is_asked_again() -> None:
    """A server's requests come when they come."""
    queue = [sequence("first", 4, 1)]

    class Queue:
        def __iter__(self) -> Iterator[Sequence]:
            return self

        def __next__(self) -> Sequence:
            if not queue:
                raise StopIteration
            return queue.pop(0)

    scheduler = Scheduler(limits(max_sequences=4), iter(Queue()))
    ((first, _),) = scheduler.next(1)
    assert (first.request.id, scheduler.next(1)) == ("first", [])
    queue += [sequence("second", 4, 1), sequence("third", 4, 1)]
    assert [one.request.id for one, _ in scheduler.next(1)] == ["second", "third"]
    for one in list(scheduler.running):
        scheduler.release(one)
    assert not scheduler.has_work()
    queue.append(sequence("fourth", 4, 1))
    assert scheduler.has_work()
    assert scheduler.next(1)[0][0].number == 3


def test_blocks_for() -> None:
    assert [blocks_for(n) for n in (1, KV_BLOCK, KV_BLOCK + 1)] == [1, 1, 2]
