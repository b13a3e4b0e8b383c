"""How many lines replicas should hold, by how fast they have turned out to be."""

from __future__ import annotations

import pytest

from mpillm.planning.replica_steps import ReplicaSteps
from mpillm.run.dispatch_messages import Standing
from mpillm.run.sharing import Sharing

ROWS = [1, 2, 4, 8, 16, 32, 64]
LINEAR = ReplicaSteps(64, ROWS, [0.01 * rows for rows in ROWS])
FLAT = ReplicaSteps(64, ROWS, [0.1] * len(ROWS))  # as where the weights are read for any number of rows


def sharing(steps: ReplicaSteps, *slower: float, lines: int, left: int = 100, whole: int = 100) -> Sharing:
    """Replicas whose steps take so many times as long as by the model.

    Each holds `lines` of `whole` rows, `left` of which are still to be computed.
    """
    made = Sharing([steps] * len(slower), ())
    for replica, times in enumerate(slower):
        for at in (1, 11):
            took = times * steps.seconds(lines) * at
            made.note(replica, Standing(at, lines * at, took, lines, lines * whole, lines * left))
    return made


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
    made = Sharing([LINEAR] * 2, ())
    for steps in (1, 11):
        made.note(0, Standing(steps, 24 * steps, 0.24 * steps, 24, 2400, 2400))
    assert made.targets([24, 24], 0) is None  # it has told nothing
    made.note(1, Standing(1, 512, 5.0, 24, 2400, 2400))
    assert made.targets([24, 24], 0) is None
    assert made.targets([24, 0], 24) is None
    assert made.targets([24, 0], 0) == pytest.approx([12, 12], abs=1)


def test_what_was_moved_must_be_seen_before_more_is() -> None:
    made = sharing(LINEAR, 1, 3, lines=24)
    assert made.targets([24, 24], 0) is not None
    assert made.targets([24, 24], 0) is None


def test_how_much_is_begun() -> None:
    """With one replica, which is never measured, as well."""
    own = Standing(10, 100, 1.0, 8, 800, 200)
    assert Sharing([], ()).begun(own) == 6.0
    assert sharing(LINEAR, 1, 3, lines=24, left=50).begun(own) == 6.0 + 12.0
    assert Sharing([], ()).begun(Standing(0, 0, 0.0, 0, 0, 0)) == 0.0
