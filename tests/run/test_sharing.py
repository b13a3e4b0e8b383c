"""How many lines replicas should hold, by how fast they have turned out to be."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from mpillm.planning.replica_steps import ReplicaSteps
from mpillm.run import sharing as sharing_module
from mpillm.run.dispatch_messages import Standing
from mpillm.run.sharing import Sharing

ROWS = [1, 2, 4, 8, 16, 32, 64]
LINEAR = ReplicaSteps(64, ROWS, [0.01 * rows for rows in ROWS])
FLAT = ReplicaSteps(64, ROWS, [0.1] * len(ROWS))  # as where the weights are read for any number of rows


def sharing(steps: ReplicaSteps, *slower: float, lines: int, left: int = 100, whole: int = 100) -> Sharing:
    """Replicas whose steps take so many times as long as by the model.

    Each holds `lines` of `whole` rows, `left` of which are still to be computed.
    """
    made = Sharing([steps] * len(slower), [1 / len(slower)] * len(slower))
    for replica, times in enumerate(slower):
        for at in (1, 11):
            took = times * steps.seconds(lines) * at
            note(made, replica, at, lines * at, took, lines, lines * whole, lines * left)
    return made


def note(made: Sharing, replica: int, *progress: float) -> None:
    """Let a report arrive at once."""
    now = time.monotonic()
    made.note(replica, Standing(*progress, at=now), now)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "slower", "held", "waiting", "targets"),
    [
        (LINEAR, (1, 3), [24, 24], 0, [36, 12]),
        (LINEAR, (3, 1), [24, 24], 0, [12, 36]),  # rank 0 may be the slow one
        (LINEAR, (1, 1.05), [24, 24], 0, None),  # not worth it
        (LINEAR, (1, 1, 3), [16, 16, 16], 0, [21, 20, 7]),
        (FLAT, (1, 3), [8, 8], 0, [16, 0]),  # fewer lines would not make the slow one faster
        (LINEAR, (1, 3), [0, 24], 0, [18, 6]),  # the fast one is done
        (LINEAR, (1, 3), [20, 4], 24, [36, 12]),  # lines that wait are shared by speed
        (LINEAR, (1, 1.02), [16, 16], 16, [24, 24]),
    ],
)
def test_all_end_together(
    steps: ReplicaSteps, slower: tuple[float, ...], held: list[int], waiting: int, targets: list[int] | None
) -> None:
    found = sharing(steps, *slower, lines=24).targets(held, waiting)
    assert found is None if targets is None else found == pytest.approx(targets, abs=1)
    if found is not None:
        assert sum(found) == sum(held) + waiting


def test_nobody_gives_back_what_is_nearly_done() -> None:
    assert sharing(LINEAR, 1, 3, lines=24, left=1).targets([24, 24], 0) is None


def test_whoever_gets_a_line_computes_it_from_its_beginning() -> None:
    begun = sharing(LINEAR, 1, 3, lines=24, left=50).targets([24, 24], 0)
    assert begun == pytest.approx([34, 14], abs=1)
    assert sharing(LINEAR, 1, 3, lines=24, left=5).targets([24, 24], 0) is None


def test_speeds_must_be_known() -> None:
    """The first step loads the weights. A replica without lines may be done before its speed is known."""
    made = Sharing([LINEAR] * 2, (0.5, 0.5))
    for steps in (1, 11):
        note(made, 0, steps, 24 * steps, 0.24 * steps, 24, 2400, 2400)
    assert made.targets([24, 24], 0) is None  # it has told nothing
    note(made, 1, 0, 0, 0.0, 24, 2400, 2400)
    assert made.targets([24, 24], 0) is None
    assert made.targets([24, 0], 24) is None
    note(made, 1, 1, 512, 5.0, 24, 2400, 2400)
    assert made.targets([24, 0], 0) == pytest.approx([12, 12], abs=1)


def test_a_first_step_says_who_gets_further_lines_and_nobody_gives_lines_back_for_it() -> None:
    made = Sharing([LINEAR] * 2, (0.5, 0.5))
    for steps in (1, 11):
        note(made, 0, steps, 24 * steps, 0.24 * steps, 24, 2400, 2400)
    note(made, 1, 1, 24, 0.72, 24, 2400, 2400)
    assert made.targets([24, 24], 0) is None
    assert made.targets([24, 24], 48) == pytest.approx([72, 24], abs=1)
    note(made, 1, 11, 264, 7.92, 24, 2400, 2400)
    assert made.targets([24, 24], 0) == pytest.approx([36, 12], abs=1)


@pytest.mark.parametrize(
    ("steps", "share", "at_first"),
    [
        (LINEAR, 1, 1),
        (LINEAR, 41, 21),
        (FLAT, 41, 41),  # a step of half the lines would take as long
        (FLAT, 100, 64),  # no more lines are computed at once
        (FLAT, 200, 100),
    ],
)
def test_some_lines_wait_until_all_speeds_are_measured(
    steps: ReplicaSteps, share: int, at_first: int
) -> None:
    made = Sharing([steps] * 2, (0.5, 0.5))
    assert made.at_first(1, share) == at_first
    note(made, 0, 1, 8, 1.0, 8, 800, 800)
    note(made, 0, 11, 88, 11.0, 8, 800, 800)
    note(made, 1, 1, 8, 1.0, 8, 800, 800)
    made.targets([8, 8], share)
    assert made.at_first(1, share) == at_first
    for steps_so_far in (11, 21, 31):
        note(made, 0, 2 * steps_so_far, 8 * steps_so_far, 2.0 * steps_so_far, 8, 800, 800)
        note(made, 1, steps_so_far, 8 * steps_so_far, 1.0 * steps_so_far, 8, 800, 800)
        made.targets([8, 8], share)
        assert at_first <= made.at_first(1, share) <= share
    assert made.at_first(1, share) == share
    assert Sharing([], ()).at_first(0, share) == share


def test_a_replica_has_computed_since_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is 1000 s ahead; a report was read 2 s after it was sent at most, for there was none 2 s before."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sharing_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    made = Sharing([LINEAR] * 2, (0.5, 0.5))
    for steps, clock.now in ((1, 0.4), (51, 20.4)):
        made.note(
            1, Standing(steps, 40 * steps, 0.4 * steps, 40, 4000, 4000, at=clock.now + 999.0), clock.now - 2
        )
        made.note(0, Standing(steps, 40 * steps, 0.4 * steps, 40, 4000, 4000, at=clock.now), clock.now)
    assert made.targets([40, 40], 80) == [80, 80]  # 1 s is the time of 100 rows
    clock.now = 35.4
    made.note(0, Standing(51, 2040, 20.4, 40, 4000, 4000, at=clock.now), clock.now)
    assert made.targets([40, 40], 80) == pytest.approx([72, 88], abs=1)


def test_what_was_moved_must_be_seen_before_more_is() -> None:
    made = sharing(LINEAR, 1, 3, lines=24)
    assert made.targets([24, 24], 0) is not None
    assert made.targets([24, 24], 0) is None


def test_how_much_is_begun() -> None:
    """With one replica, which is never measured, as well."""
    own = Standing(10, 100, 1.0, 8, 800, 200, 0.0)
    assert Sharing([], ()).begun(own) == 6.0
    assert sharing(LINEAR, 1, 3, lines=24, left=50).begun(own) == 6.0 + 12.0
    assert Sharing([], ()).begun(Standing(0, 0, 0.0, 0, 0, 0, 0.0)) == 0.0
