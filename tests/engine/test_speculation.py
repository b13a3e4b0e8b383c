"""What is drafted: by what stood before, as far as it is likely to be right, and as far as a row is worth it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpillm.engine.answer_index import END, LONGEST, RUN, AnswerIndex
from mpillm.engine.drafter import Acceptance, Drafted, Lookup
from mpillm.engine.request import Request
from mpillm.engine.sampler import Candidates
from mpillm.engine.sequence import Sequence
from mpillm.engine.speculation import RowCost, Speculation
from mpillm.engine.step import Chunk, Step
from mpillm.engine.turn import Turn


@pytest.mark.parametrize(
    ("tokens", "following", "matched"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 1], [], 0),
        ([1, 2, 3], [], 0),
        ([1, 2, 3, 4, 9, 2], [], 0),  # one token is not enough
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1, 2], 2),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2], 2),  # the last place,
        ([0, 1, 2, 3, 1, 2, 4, 0, 1, 2], [3, 1, 2, 4, 0], 3),  # but the longest first
        ([5, 5, 5], [5, 5], 2),
    ],
)
def test_what_followed_the_longest_match(tokens: list[int], following: list[int], matched: int) -> None:
    for cut in range(1, len(tokens) + 1):
        lookup = Lookup()
        if cut < len(tokens):
            lookup.guess(tokens[:cut])
        guess = lookup.guess(tokens) if tokens else lookup.guess([0])
        assert guess.tokens[: len(following)] == following
        assert len(guess.tokens) == (LONGEST if following else 0)
        assert guess.matched == matched


def test_a_long_match_is_found_anywhere() -> None:
    rng = np.random.default_rng(4)
    text = rng.integers(0, 50, 3000).tolist()
    for at in rng.integers(40, 2900, 30):
        guess = Lookup().guess([*text, *text[at - 40 : at]])
        assert guess.tokens == text[at : at + LONGEST]


def test_what_followed_in_a_finished_answer() -> None:
    index = AnswerIndex(1 << 10)
    assert index.guess([1, 2, 3]).tokens == []
    index.add([7, 1, 2, 3, 4, 5], 1)
    index.add([1, 2, 3, 6], 1)
    assert index.guess([1, 2]).tokens == []
    assert index.guess([9, 1, 2, 3]) == ([6], 3)  # the last place,
    assert index.guess([7, 1, 2, 3]) == ([4, 5], 4)  # but the longest first, up to the end of that answer
    assert index.guess([3, 4, 5]).tokens == index.guess([5, 1, 2]).tokens == []


@pytest.mark.parametrize("vocabulary", [2, 30, 100_000])
def test_the_last_answers_are_found_and_no_others(vocabulary: int) -> None:
    """Against a search through all that is kept, at every place of the last answers."""
    rng, kept = np.random.default_rng(vocabulary), 256
    index, answers = AnswerIndex(kept), list[list[int]]()
    for _ in range(60):
        answers.append(rng.integers(0, vocabulary, rng.integers(1, 90)).tolist())
        index.add([5, *answers[-1]], 1)
        own = [token for answer in answers[-30:] for token in (5, *answer, END)][-kept:]
        text = answers[-1][: rng.integers(1, 90)]
        found = index.guess([5, *text])
        places = [
            at
            for at in range(RUN, len(own))
            if own[at - RUN : at] == [5, *text][-RUN:] and len(text) + 1 >= RUN and own[at] != END
        ]
        if vocabulary == 2:  # more places than are tried
            assert bool(found.tokens) <= bool(places)
            continue
        for at in places[-1:] if found.tokens else []:
            assert found.tokens[0] in {own[place] for place in places}, at
        if len(text) >= RUN and len(text) < len(answers[-1]):
            assert found.tokens == answers[-1][len(text) :][:LONGEST]
            assert found.matched == min(len(text) + 1, 32)


def test_an_answer_like_a_finished_one_is_faster() -> None:
    rng = np.random.default_rng(5)
    speculation = Speculation("auto", False, 1.0)
    answers = [rng.integers(0, 1000, 80).tolist() for _ in range(3)]
    passes = []
    for answer in [*answers, *answers]:
        prompt = rng.integers(0, 1000, 40).tolist()
        passes.append(run(speculation, [*answer[:10], 3, *answer[10:]], prompt, 0.1)[1])
        done = Sequence(Request("a", tuple(prompt), max_tokens=100))
        done.tokens += answer
        speculation.ended(done)
    assert min(passes[:3]) > 60
    assert max(passes[3:]) < 40


def test_acceptance_follows_what_is_seen() -> None:
    rate = Acceptance(0.5)
    for _ in range(100):
        rate.note(0, 1)
    assert 0 < rate.value < 0.05
    for _ in range(20):
        rate.note(15, 0)
    assert 0.95 < rate.value < 1


@pytest.mark.parametrize("part", [0.02, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("unit", [1e-4, 30.0])
def test_what_rows_cost(part: float, unit: float) -> None:
    """Steps of 1 to 9 rows that take (1 - part) + part x rows, with a tenth of noise."""
    rng, cost = np.random.default_rng(3), RowCost(0.3)
    assert cost.part(1) == 0.3
    assert cost.part(20) > 0.8
    for _ in range(60):
        rows = int(rng.integers(1, 10))
        cost.note(rows, unit * (1 - part + part * rows) * rng.uniform(0.95, 1.05))
    for rows in (1, 4):
        assert cost.part(rows) == pytest.approx(part * rows / (1 - part + part * rows), abs=0.12)


def test_a_step_that_was_interrupted_says_nothing_of_rows() -> None:
    """One step in 15 takes 15 times as long, as where another process has the core for a while."""
    part, rng, cost, found = 0.13, np.random.default_rng(3), RowCost(0.3), list[float]()
    for number in range(300):
        rows = int(rng.choice([1, 1, 1, 1, 2, 3, 4, 8, 16]))
        cost.note(rows, 1 - part + part * rows + (15.0 if number % 15 == 7 else 0.0))
        found.append(cost.part(1))
    assert found[60:] == pytest.approx([part] * 240, abs=0.1)


def test_steps_that_become_slower_for_good_are_believed() -> None:
    cost = RowCost(0.3)
    for unit in (1.0, 20.0):
        for number in range(200):
            cost.note(1 + number % 4, unit * (0.9 + 0.1 * (1 + number % 4)))
    assert cost.seconds(1) == pytest.approx(20.0, rel=0.1)
    assert cost.part(1) == pytest.approx(0.1, abs=0.06)


def drafted(speculation: Speculation, sequence: Sequence, rows: int = 1, maximum: int = 15) -> int:
    if not speculation.begin_step(rows):
        return 0
    return len(speculation.draft(sequence, maximum))


def run(speculation: Speculation, answer: list[int], prompt: list[int], cost: float) -> tuple[int, int]:
    """Rows and steps that an answer of a sequence takes alone, where each row costs `cost` of a step of one."""
    sequence = Sequence(Request("a", tuple(prompt), max_tokens=len(answer)))
    steps = rows = 0
    while sequence.generated < len(answer):
        maximum = sequence.capacity(len(sequence.tokens) - sequence.computed)
        drafts = speculation.draft(sequence, min(maximum, 15)) if speculation.begin_step(1) else []
        right = 0
        for token, *_ in drafts:
            if token != answer[sequence.generated + right]:
                break
            right += 1
        for token in answer[sequence.generated :][: right + 1]:
            sequence.append(token)
        speculation.judge(sequence)
        speculation.note_step(1 + len(drafts), 1 + cost * len(drafts))
        steps, rows = steps + 1, rows + 1 + len(drafts)
        sequence.computed = len(sequence.tokens) - 1
    return rows, steps


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("vocabulary", [3, 40, 1000])
def test_drafts_never_cost_more_than_they_may(cost: float, vocabulary: int) -> None:
    """Random answers, in whose short matches there is little to gain: at least 0.95 of the speed without drafts."""
    rng = np.random.default_rng(vocabulary)
    speculation = Speculation("auto", streams=cost == 0.0, expert_share=1.0)
    seconds = tokens = 0.0
    for _ in range(8):
        answer = rng.integers(0, vocabulary, 100).tolist()
        rows, steps = run(speculation, answer, rng.integers(0, vocabulary, 400).tolist(), cost)
        seconds += steps + cost * (rows - steps)
        tokens += len(answer)
    assert tokens / seconds > 0.95


@pytest.mark.parametrize(("cost", "gain"), [(0.0, 6.0), (0.1, 2.5), (0.3, 1.4)])
def test_an_answer_that_copies_its_prompt_is_faster(cost: float, gain: float) -> None:
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, 1000, 300).tolist()
    answer = [*prompt[20:90], *rng.integers(0, 1000, 5).tolist(), *prompt[120:250]]
    rows, steps = run(Speculation("auto", cost == 0.0, 1.0), answer, prompt, cost)
    assert len(answer) / (steps + cost * (rows - steps)) > gain


def test_nothing_is_drafted_where_rows_are_dear() -> None:
    copies = Sequence(Request("a", tuple([1, 2, 3, 4, 5, 6, 7, 8] * 4), max_tokens=100))
    assert drafted(Speculation("auto", False, 1.0), copies) > 0
    assert drafted(Speculation("auto", False, 1.0), copies, rows=60) == 0
    assert drafted(Speculation("auto", True, 1.0), copies, rows=20) > 0
    # Of a mixture only where a step goes to nearly all experts.
    assert drafted(Speculation("auto", True, 1 / 16), copies, rows=4) == 0
    assert drafted(Speculation("auto", True, 1 / 4), copies, rows=16) > 0
    assert drafted(Speculation("prompt-lookup", False, 1 / 16), copies, rows=60) == 15


def test_a_draft_ends_before_the_text_does() -> None:
    stops = Sequence(Request("a", (1, 2, 3, 4, 5, 1, 2), max_tokens=100, stop_ids=frozenset({4})))
    always = Speculation("prompt-lookup", False, 1.0)
    assert always.draft(stops, 15) == [Drafted(3)]
    assert Sequence(Request("a", (1, 2), max_tokens=5)).capacity(2) == 4
    assert Sequence(Request("a", (1, 2), max_tokens=5)).capacity(1) == 0  # no token is drawn
    assert Sequence(Request("a", (1, 2), max_tokens=0)).capacity(2) == 0


@dataclass
class Script:
    """A constraint: the sets of tokens that may follow one after the other; one alone is forced."""

    sets: list[set[int]]
    at: int = 0
    complete: bool = field(default=True)

    @property
    def forced(self) -> list[int]:
        return [] if self.ended or len(self.sets[self.at]) > 1 else list(self.sets[self.at])

    @property
    def ended(self) -> bool:
        return self.at == len(self.sets)

    def push(self, token: int) -> None:
        assert token in self.sets[self.at]
        self.at += 1

    def copy(self) -> Script:
        return Script(self.sets, self.at)

    def accepts(self, token: int) -> bool:
        return token in self.sets[self.at]

    def allowed(self) -> NDArray[np.int32]:
        return np.array([sum(1 << token for token in self.sets[self.at])], np.int32)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ([{3, 9}, {4, 9}, {8}, {7}, {1, 2}, {1}], [3, 4, 8, 7]),  # what is forced goes on, the guess does not
        ([{3, 9}, {4}, {5, 9}, {7, 8}], [3, 4, 5]),
        ([{8, 9}, {4}], []),
        ([{7}, {8}, {4, 5}], [7, 8]),
        ([{3, 4}, {4}], [3]),  # behind the last one nothing is drawn
    ],
)
def test_drafts_obey_a_constraint(sets: list[set[int]], expected: list[int]) -> None:
    asked = Request("a", (1, 2, 3, 4, 5, 1, 2), max_tokens=100, constraint=lambda: Script(sets))
    drafts = Speculation("prompt-lookup", False, 1.0).draft(Sequence(asked), 15)
    assert [token for token, *_ in drafts] == expected
    for at, draft in enumerate(drafts, 1):
        assert draft.allowed is not None
        assert draft.allowed.tolist() == [sum(1 << token for token in sets[at])]


def candidates(token: int, **more: Any) -> Candidates:
    one = np.ones(1, np.float32)
    return Candidates(np.array([token], np.int32), one, one, one, math.nan, math.nan, False, **more)


@pytest.mark.parametrize(("wrong", "finite"), [(0, True), (1, True), (2, False), (3, False)])
def test_what_is_not_finite_behind_a_wrong_draft_does_not_matter(wrong: int, finite: bool) -> None:
    """Four drafts, of which number `wrong` is not what is drawn; the row behind the second is NaN."""
    drafts = [21, 22, 23, 24]
    sequence = Sequence(Request("a", (20,), max_tokens=10))
    sequence.drafts = [Drafted(token + (at == wrong)) for at, token in enumerate(drafts)]
    chunks = [Chunk(at, np.array([20 + at], np.int32), (), sample_k=1) for at in range(5)]
    step = Step(0, tuple(chunks))
    turn = Turn(sequence, 1, chunks[0], [[at] for at in range(5)], step)
    found = {at: candidates(21 + at, finite=at != 2) for at in range(5)}
    turn.take_scores([found[at] for at in range(5)])
    while row := turn.row:
        assert turn.draw(row, found)
    assert sequence.finite is finite
    assert turn.accepted == min(wrong, 2)
    assert sequence.tokens[1:] == [21, 22, 23][: min(wrong + 1, 2)]
