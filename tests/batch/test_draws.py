"""The keys of a body that say how tokens are drawn: distributions as transformers has them, and what each key means."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.engine.request import FinishedCompletion
from tests.batch.make_draws import BODIES, FILE, PROMPT
from tests.job_helpers import CHAT, END, TEXT, works
from tests.model.engine_harness import run_engine

DRAWS = 1000  # of each body
EXPECTED: list[dict[str, float]] = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Counter[int]]:
    """How often each token was drawn for each body."""
    shared = {"prompt": PROMPT, "max_tokens": 1, "n": DRAWS, "temperature": 1.0, "seed": 12}
    made = works(tmp_path_factory.mktemp("draws"), *(shared | body for body in BODIES))
    completions = iter(run_engine(CHAT, [request for work in made for request in work.requests]))
    return [Counter(next(completions).tokens[0] for _ in work.requests) for work in made]


@pytest.mark.parametrize(("number", "body"), list(enumerate(BODIES)))
def test_tokens_are_drawn_as_transformers_does(
    number: int, body: dict[str, Any], drawn: list[Counter[int]]
) -> None:
    p = {int(token): value for token, value in EXPECTED[number].items()}
    counts = drawn[number]
    assert counts.keys() <= p.keys()
    assert counts.total() == DRAWS
    likely = [token for token, value in p.items() if value * DRAWS >= 5]
    assert likely
    found = np.array([counts[token] for token in likely])
    wanted = np.array([p[token] * DRAWS for token in likely])
    # The draws follow from the seed: these are no limits that a run could miss by chance.
    assert np.all(np.abs(found - wanted) < 5 * np.sqrt(wanted) + 1)
    assert np.sum((found - wanted) ** 2 / wanted) < 2 * len(likely) + 12
    assert abs(found.sum() - wanted.sum()) < 5 * np.sqrt(DRAWS) / 2 + 1


def test_the_file_is_of_these_bodies() -> None:
    assert len(EXPECTED) == len(BODIES)
    kept = [len(p) for p in EXPECTED]
    assert kept[3] == 5  # top_k
    assert kept[4] < kept[0]  # top_p
    assert set(EXPECTED[9]) <= {"3", "7", "11", "40"}


def generated(folder: Path, *bodies: dict[str, Any]) -> list[FinishedCompletion]:
    """What the model answers greedily."""
    shared = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True}
    made = works(folder, *(shared | body for body in bodies))
    return run_engine(CHAT, [work.requests[0] for work in made])


def test_penalties_count_what_was_generated(tmp_path: Path) -> None:
    bodies = [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.4},
        {"presence_penalty": -2, "frequency_penalty": 1},
    ]
    answers = generated(tmp_path, *({**body, "logprobs": TEXT.vocab_size} for body in bodies))
    assert len({tuple(answer.tokens) for answer in answers}) == len(bodies)
    for body, answer in zip(bodies, answers, strict=True):
        counts: Counter[int] = Counter()
        for token, top in zip(answer.tokens, answer.top, strict=True):
            assert len(top) == TEXT.vocab_size
            left = {
                other: value
                - counts[other] * body.get("frequency_penalty", 0)
                - (counts[other] > 0) * body.get("presence_penalty", 0)
                for other, value in top
            }
            assert left[token] >= max(left.values()) - 1e-5
            counts[token] += 1
        assert counts.most_common(1)[0][1] > 1, "something is said again"


def test_bad_words_are_not_said(tmp_path: Path) -> None:
    (plain,) = generated(tmp_path, {})
    pairs = [
        pair
        for pair in pairwise(plain.tokens)
        if tuple(TEXT.encode(TEXT.decode(pair, start=False), False)) == pair
    ]
    assert pairs
    words = [TEXT.decode(pair, start=False) for pair in pairs[:2]]
    (other,) = generated(tmp_path, {"bad_words": words})
    assert not set(pairs[:2]) & set(pairwise(other.tokens))


def test_when_an_answer_may_end(tmp_path: Path) -> None:
    (plain,) = generated(tmp_path, {})
    stop = plain.tokens[3]
    first = plain.tokens.index(stop)
    ending = {"logit_bias": {str(END): 100}}
    stopped, later, ended, ignored = generated(
        tmp_path,
        {"stop_token_ids": [stop]},
        {"stop_token_ids": [stop], "min_tokens": first + 6},
        {**ending, "ignore_eos": False},
        {**ending},
    )
    assert (stopped.tokens, stopped.stop_id) == (plain.tokens[: first + 1], stop)
    assert len(later.tokens) >= first + 7 or later.finish_reason == "length"
    assert stop not in later.tokens[: first + 6]
    assert (ended.tokens, ended.finish_reason) == ([END], "stop")
    assert (ignored.tokens, ignored.finish_reason) == ([END] * 40, "length")


def test_the_smallest_numbers_that_a_key_can_have(tmp_path: Path) -> None:
    """A temperature that float32 has not, and such numbers of all other keys, with and without log-probabilities."""
    tiny = (5e-324, 2.3e-313, 1e-46, 1e-40)
    bodies = [
        {key: value, "seed": 5, **more}
        for value in tiny
        for key in ("temperature", "top_p", "min_p", "presence_penalty")
        for more in ({}, {"logprobs": 2}, {"top_k": 3})
    ]
    bodies += [{"repetition_penalty": value} for value in (0.01, 100.0)]
    plain, *answers = generated(tmp_path, {}, *({"temperature": 1.0, **body} for body in bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert len(answer.tokens) == 40
        if {"temperature", "top_p"} & body.keys():  # no other token is drawn than the most likely one
            assert answer.tokens == plain.tokens, body
