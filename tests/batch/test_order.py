"""The order of computing: a walk over the tree of all prompts, the longest answers first."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mpillm.batch.answers import result_line
from mpillm.batch.order import Order, ordered
from mpillm.batch.work import Work
from mpillm.engine.limits import Limits, Totals
from mpillm.engine.scheduler import Scheduler
from mpillm.engine.sequence import Sequence
from mpillm.kernels import KV_BLOCK
from tests.e2e.jobs import WORDS
from tests.job_helpers import CHAT, TEXT, WITH_TEXT, WITHOUT_TEXT, checked, works
from tests.model.engine_harness import run_engine


def line(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": max_tokens}
    return body if max_tokens else {**body, "echo": True, "logprobs": 0}


def numbers(made: list[Work], cached_tokens: int = 0) -> list[int]:
    order = Order(cached_tokens)
    for work in made:
        order.add(work)
    return order.indices().tolist()


def walk(lines: list[tuple[list[int], int]], left: list[int], block: int = 1) -> list[int]:
    """What `Order` is to find for prompts of less than 9 blocks, where every block is a level."""
    if len(left) == 1:
        return left
    children: dict[Any, list[int]] = {}
    for at in left:
        begin = tuple(lines[at][0][: block * KV_BLOCK])
        children.setdefault(begin if len(begin) == block * KV_BLOCK else at, []).append(at)

    def longest(child: list[int]) -> tuple[int, int]:
        return max((lines[at][1], len(lines[at][0])) for at in child)

    in_order = sorted(children.values(), key=lambda child: (longest(child), -min(child)), reverse=True)
    return [at for child in in_order for at in walk(lines, child, block + 1)]


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_is_walked(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    lines = [
        (
            [draw.randrange(2) for _ in range(draw.randrange(9)) for _ in [0]]
            and [token for _ in range(draw.randrange(8)) for token in [draw.randrange(2)] * KV_BLOCK]
            + [5] * draw.randrange(1, KV_BLOCK),
            draw.choice([0, 0, 1, 7, 30]),
        )
        for _ in range(draw.randrange(1, 40))
    ]
    lines = [(prompt or [3], max_tokens) for prompt, max_tokens in lines]
    made = works(tmp_path, *(line(*one) for one in lines), model=WITHOUT_TEXT)
    assert numbers(made) == walk(lines, list(range(len(lines))))


def test_long_beginnings_are_together(tmp_path: Path) -> None:
    """What prompts have in common may be longer than 8 blocks; levels are further apart there."""
    begins = [[number] * 15 * KV_BLOCK for number in range(5)]
    made = works(tmp_path, *(line(begins[at % 5] + [at], 1) for at in range(20)), model=WITHOUT_TEXT)
    assert [at % 5 for at in numbers(made)] == [number for number in range(5) for _ in range(4)]


def test_bad_lines_have_their_place(tmp_path: Path) -> None:
    batch = checked(
        tmp_path, [{"prompt": [1], "max_tokens": 1}, {"no": 1}, {"prompt": [2], "max_tokens": 9}],
        model=WITHOUT_TEXT,
    )  # fmt: skip
    assert [work.custom_id for work in batch.ordered_works()] == ["request-3", "request-1"]
    assert [work.custom_id for work in batch.ordered_works({"request-3"})] == ["request-1"]
    assert [work.custom_id for work in batch.works()] == ["request-1", "request-3"]


def test_a_stream_is_ordered_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpillm.batch.order.WINDOW", 3)
    made = works(tmp_path, *(line([1], count) for count in (1, 2, 3, 4, 5)), model=WITHOUT_TEXT)
    taken = [work.requests[0].max_tokens for work in ordered(iter(made))]
    assert taken == [3, 2, 1, 5, 4]


def test_answers_are_the_same_in_either_order(tmp_path: Path) -> None:
    """Scoring behind examples, questions about documents, and chats; the order differs, and no byte of a line does."""
    draw = random.Random(8)
    begins = [TEXT.encode(" ".join(draw.choices(WORDS, k=40))) for _ in range(3)]
    bodies = [
        {"prompt": [*draw.choice(begins), draw.randrange(3, 200)], **more}
        for more in [{"max_tokens": 0, "echo": True, "logprobs": 2}, {"max_tokens": 9, "temperature": 1.0}]
        * 9
    ]
    made = works(
        tmp_path, *bodies, *({"messages": [{"role": "user", "content": word}]} for word in WORDS[:4])
    )
    found = []
    for lines in (made, [made[at] for at in numbers(made)]):
        asked = [request for work in lines for request in work.requests]
        by_name = {
            one.request.id: one for one in run_engine(CHAT, asked, max_num_seqs=5, max_num_batched_tokens=64)
        }
        found.append([result_line(work, [by_name[work.custom_id]], WITH_TEXT) for work in made])
    assert numbers(made) != list(range(len(made)))
    assert found[0] == found[1]


def computed(made: list[Work]) -> Totals:
    """What the scheduler does with works in this order, each of which generates all that it may."""
    limits = Limits(n_blocks=80, blocks_in_memory=80, max_sequences=16, max_tokens=128, micro_batches=1)
    scheduler = Scheduler(limits, (Sequence(request) for work in made for request in work.requests))
    while scheduler.has_work():
        scheduler.totals.steps += 1
        for sequence, count in scheduler.next(1):
            sequence.in_flight = False
            begin, end = max(sequence.computed, sequence.reached), sequence.computed + count
            scheduler.totals.prompt_tokens += max(0, min(end, len(sequence.request.prompt)) - begin)
            sequence.computed = end
            sequence.reached = max(sequence.reached, end)
            if end == len(sequence.tokens):
                if sequence.request.max_tokens:
                    sequence.append(1)
                if sequence.request.only_reads or sequence.finish_reason is not None:
                    scheduler.release(sequence)
    return scheduler.totals


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_answers_of_all_system_prompts_come_first(seed: int, tmp_path: Path) -> None:
    """The cache can keep all system prompts, so a batch is full until the end; where it cannot, each has its turn."""
    draw = random.Random(seed)
    systems = [[draw.randrange(100) for _ in range(3 * KV_BLOCK)] for _ in range(3)]
    asked = [([*draw.choice(systems), at % 100, at // 100], int(2 ** draw.uniform(1, 8))) for at in range(96)]
    made = works(tmp_path, *(line(*one) for one in asked), model=WITHOUT_TEXT)
    kept = [made[at] for at in numbers(made, 80 * KV_BLOCK)]
    answers = [work.requests[0].max_tokens for work in kept]
    assert answers == sorted(answers, reverse=True)
    small = [asked[at][0][: 3 * KV_BLOCK] for at in numbers(made, 8 * KV_BLOCK)]
    assert sum(one != other for one, other in pairwise(small)) == 2
    totals = [computed(order) for order in (made, [made[at] for at in numbers(made)], kept)]
    maximum = max(answers)
    assert totals[2].steps <= max(sum(answers) / 16, maximum) + 16
    assert totals[2].steps < totals[0].steps
    assert totals[2].prompt_tokens == totals[0].prompt_tokens


def test_it_saves_steps_and_tokens(tmp_path: Path) -> None:
    """Many questions about each of some documents, shuffled: each document is computed about once."""
    draw = random.Random(3)
    documents = [[draw.randrange(100) for _ in range(8 * KV_BLOCK)] for _ in range(30)]
    asked = [
        (document + [draw.randrange(100) for _ in range(5)], 8) for document in documents for _ in range(6)
    ]
    draw.shuffle(asked)
    made = works(tmp_path, *(line(*one) for one in asked), model=WITHOUT_TEXT)
    as_given, by_order = computed(made), computed([made[at] for at in numbers(made)])
    once = sum(map(len, documents)) + 5 * len(asked)
    assert by_order.prompt_tokens < 1.1 * once
    assert as_given.prompt_tokens > 2 * once
    assert by_order.steps < 0.6 * as_given.steps
