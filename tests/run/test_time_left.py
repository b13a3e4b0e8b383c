"""The time left, on requests that are computed a batch at a time, with answers of all kinds of lengths."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from mpillm.run.time_left import AnswerLengths, TimeLeft

LONGEST, PROMPT, BATCH = 1000, 20, 32

Draw = Callable[[random.Random], int]
LENGTHS: dict[str, Draw] = {
    "all as long as allowed": lambda draw: LONGEST,
    "all short": lambda draw: 50,
    "varied": lambda draw: min(1 + int(draw.expovariate(1 / 100)), LONGEST),
    "short and long": lambda draw: draw.choice([20, 20, 20, LONGEST]),
}


def test_parts_of_requests_tell() -> None:
    """All requests of a batch end late: 30 seconds have computed half of 40."""
    left = TimeLeft(40, 0)
    assert left.seconds(0, 0.0, 1.0) is None
    assert left.seconds(0, 20.0, 30.0) == left.seconds(1, 19.0, 30.0) == 30.0
    assert left.seconds(40, 0.0, 60.0) == 0.0
    resumed = TimeLeft(40, 10)  # and 5 requests' worth of others
    assert resumed.seconds(10, 5.0, 1.0) is None
    assert resumed.seconds(10, 15.0, 10.0) == 15.0
    assert resumed.seconds(30, 5.0, 10.0) == 2.5  # of the 20 since, 5 were computed before
    assert TimeLeft(1, 0).seconds(0, 0.0, 1.0) is None


def test_answers_that_run_count_as_long_as_allowed_until_many_are_finished() -> None:
    lengths = AnswerLengths()
    assert (lengths.part(0), lengths.part(4000)) == (1.0, 1.0)
    for finished, part in ((4, 0.55), (32, 0.2)):
        while lengths.allowed < finished * LONGEST:
            lengths.add(100, LONGEST)
        assert lengths.part(4000) == pytest.approx(part)
    assert lengths.part(0) == pytest.approx(0.1)


def test_what_runs_is_weighed_with_its_prompts() -> None:
    lengths = AnswerLengths()
    lengths.add(100, 1000)
    assert lengths.whole(50, 1000, 1000) == 1050  # nothing is left to guess
    assert lengths.whole(50, 1000, 0) == pytest.approx(50 + 1000 * 1100 / 2000)
    assert lengths.whole(50, 1000, 400) == pytest.approx(450 + 600 * 1100 / 2000)
    assert lengths.whole(0, 0, 0) == 0.0


@pytest.mark.parametrize("kind", LENGTHS)
def test_it_is_about_right_in_the_second_half(kind: str) -> None:
    """Within 40 % of what it takes; before, the short ones alone are known. A step takes a second."""
    draw = random.Random(7)
    lengths = [LENGTHS[kind](draw) for _ in range(400)]
    found, left, known = list[tuple[int, float]](), TimeLeft(len(lengths), 0), AnswerLengths()
    waiting, running, answered, now = list(lengths), list[list[int]](), 0, 0
    while waiting or running:
        while waiting and len(running) < BATCH:
            running.append([waiting.pop(), 0])
        now += 1
        for one in running:
            one[1] += 1
        for whole, _ in [one for one in running if one[0] == one[1]]:
            known.add(whole, LONGEST)
            answered += 1
        running = [one for one in running if one[0] > one[1]]
        # As `Leader.standing` and `Sharing.begun` have it.
        generated, most = sum(done for _, done in running), LONGEST * len(running)
        rest = known.part(most) * (most - generated)
        whole_rows = PROMPT * len(running) + generated + rest
        begun = len(running) * (1 - rest / whole_rows) if running else 0.0
        if (seconds := left.seconds(answered, begun, float(now))) is not None:
            found.append((now, seconds))
    for at, seconds in found:
        if 0.5 * now < at < 0.9 * now:
            assert 0.6 < (at + seconds) / now < 1.4, (at, now, seconds)
