"""What is drawn has the distribution that transformers draws from, for each key of a body that changes it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.batch.make_draws import BODIES, FILE, PROMPT
from tests.job_helpers import CHAT, works
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
