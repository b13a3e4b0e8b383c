"""How a run that begins is laid out: how long it measures its hosts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpillm import spec
from mpillm.comm import probe
from mpillm.errors import LayoutError
from mpillm.partition.replicas import Replica
from mpillm.planning import measure
from mpillm.planning.input_needs import NO_INPUT
from mpillm.planning.layout_plans import Chosen
from mpillm.planning.machines import Machines
from mpillm.planning.speed import ASSUMED, Speed
from mpillm.run import laying_out, speed_notes
from mpillm.run.laying_out import LaidOut, LayoutChoice

TWO_HOSTS = Machines([1, 1], [2**30, 2**30])


class World:
    """Rank 0's, which waits for no other one before the layout is known; `paces` are those of all ranks."""

    def __init__(self, *places: str, paces: Sequence[float] = (1.0, 1.0)) -> None:
        self.nodes = SimpleNamespace(
            places=places,
            ranks_per_host=[1, 1],
            free=[2**33, 2**33],
            loads=lambda asked: [("a", 0.1), ("b", 0.1)],
            paces=paces,
        )
        self.rank, self.size, self.host, self.hosts = 0, 2, "here", ("a", "b")

    def on_rank_0(self, work: Any) -> Any:
        return work()

    def together(self) -> Any:
        return nullcontext()


@pytest.fixture(autouse=True)
def timed_links(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The efforts with which links were timed; speeds stay as they are."""
    efforts: list[float] = []
    monkeypatch.setattr(probe, "links", lambda world, effort: efforts.append(effort) or [])
    monkeypatch.setattr(measure, "linked", lambda world, speeds, links: speeds)
    return efforts


def choice(world: Any, job: spec.Spec, source: Any) -> LayoutChoice:
    planner: Any = SimpleNamespace(source=source)
    return LayoutChoice(world, job, lambda: planner, lambda: NO_INPUT, None, True, True)


@pytest.mark.parametrize(
    ("assumed", "measured", "efforts"),
    [
        (0.5, 0.5, []),
        (5.0, 4.0, [measure.QUICKLY]),
        (5.0, 150.0, [measure.QUICKLY, 1.0]),  # the hosts are slower than assumed
        (150.0, 4.0, [measure.QUICKLY]),
        (50.0, 50.0, [measure.QUICKLY]),  # to know more would take 4 % of it
    ],
)
def test_short_jobs_are_measured_briefly(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assumed: float,
    measured: float,
    efforts: list[float],
) -> None:
    """By the assumed speeds a job takes some seconds, and by those that were measured others."""
    made: list[float] = []
    pipeline = Chosen((Replica(0, 2, 1),), "")

    def searched(self: LayoutChoice, job: spec.Spec, machines: Machines, worth: float = 1.0) -> LaidOut:
        return LaidOut(pipeline, TWO_HOSTS, range(2), measured if made else assumed)

    def speeds(world: World, source: None, threads: int, effort: float, budget: None) -> list[Speed]:
        made.append(effort)
        return [ASSUMED, ASSUMED]

    monkeypatch.setattr(LayoutChoice, "_search", searched)
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "speeds", speeds)
    job: Any = spec.load(None, (), model="model", input="in", output="out")
    source: Any = SimpleNamespace(path=tmp_path / "model")
    world: Any = World()
    choice(world, job, source).first(1)
    assert made == efforts


@pytest.mark.parametrize(
    ("seconds", "saved", "paces", "times_links", "measures"),
    [
        (4.0, (2.0, 2.0), (1.0, 1.0), True, True),
        (4.0, (2.0, 0.1), (1.0, 1.0), True, False),  # the network is not as good as that
        (4.0, (0.2, 0.2), (1.0, 1.0), False, False),  # less than measuring may cost
        (4.0, (0.5, 0.5), (0.3, 0.3), False, False),  # where that takes longer, too
        (0.9, (5.0, 5.0), (1.0, 1.0), False, False),
    ],
)
def test_a_job_for_one_host_is_measured_only_if_shards_may_save_more(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    timed_links: list[float],
    seconds: float,
    saved: tuple[float, float],
    paces: tuple[float, float],
    times_links: bool,
    measures: bool,
) -> None:
    """`saved` is what shards may save on a network that is assumed, and on the one that is there."""
    made: list[float] = []

    def searched(self: LayoutChoice, job: spec.Spec, machines: Machines, worth: float = 1.0) -> LaidOut:
        return LaidOut(Chosen((Replica(0, 1, 1),), ""), machines, range(1), seconds)

    def speeds(world: World, source: None, threads: int, effort: float, budget: None) -> list[Speed]:
        made.append(effort)
        return [ASSUMED, ASSUMED]

    monkeypatch.setattr(LayoutChoice, "_search", searched)
    monkeypatch.setattr(laying_out, "shards_may_save", lambda layouts, machines: saved[machines.linked])
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "speeds", speeds)
    job: Any = spec.load(None, (), model="model", input="in", output="out")
    choice(World("a", "b", paces=paces), job, SimpleNamespace(path=tmp_path / "model")).first(1)
    assert (bool(timed_links), bool(made)) == (times_links, measures)
    assert len(timed_links) <= 1  # the brief measurement does not time them again


def test_a_rank_from_the_reserve_is_as_fast_as_another_one_of_its_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used: list[Sequence[Speed]] = []

    def searched(self: LayoutChoice, job: spec.Spec, machines: Machines, worth: float = 1.0) -> LaidOut:
        used.append(machines.speeds)
        return LaidOut(Chosen((Replica(0, 2, 1),), ""), machines, range(2))

    monkeypatch.setattr(LayoutChoice, "_search", searched)
    job: Any = spec.load(None, (), model="model", input="in", output="out")
    origin: Any = SimpleNamespace(
        wire="f32", speed_now=ASSUMED, laid_out=lambda world, wire: (Replica(0, 2, 1),)
    )
    for numbers, speeds, known in [
        ([0, 0], [ASSUMED, None], [[ASSUMED, ASSUMED]]),
        ([0, 1], [ASSUMED, None], []),  # another host may have any speed
    ]:
        used.clear()
        world = World("a", "b")
        world.nodes.numbers = numbers
        monkeypatch.setattr(world, "gather", lambda own, speeds=speeds: speeds, raising=False)
        choice(world, job, SimpleNamespace(path=tmp_path / "model")).again(origin)
        assert used == known


def test_later_runs_on_the_same_hosts_do_not_measure_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    used: list[list[Speed]] = []
    speeds = [ASSUMED.shared_by(1), ASSUMED.shared_by(3)]

    def searched(self: LayoutChoice, job: spec.Spec, machines: Machines, worth: float = 1.0) -> LaidOut:
        used.append(list(machines.speeds))
        return LaidOut(Chosen((Replica(0, 2, 1),), ""), TWO_HOSTS, range(2), seconds)

    def measured(world: World, source: None, threads: int, effort: float, budget: None) -> list[Speed]:
        made.append(effort)
        return speeds

    monkeypatch.setattr(LayoutChoice, "_search", searched)
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "speeds", measured)
    job: Any = spec.load(None, (), model="model", input="in", output="out")
    source: Any = SimpleNamespace(path=tmp_path / "model")

    def begin(*places: str, threads: int = 1, paces: Sequence[float] = (1.0, 1.0)) -> list[float]:
        made.clear()
        world: Any = World(*places, paces=paces)
        choice(world, job, source).first(threads)
        return list(made)

    seconds = 5.0
    assert begin("a", "b") == [measure.QUICKLY]
    assert begin("a", "b") == []
    assert [speed.memory for speed in used[-1]] == [speed.memory for speed in speeds]
    assert begin("a", "c") == begin("a", "b", threads=2) == [measure.QUICKLY]
    assert begin("a", "b") == []
    assert begin("a", "b", paces=(1.1, 0.9)) == []
    assert begin("a", "b", paces=(1.0, 0.33)) == [measure.QUICKLY]  # it has become slow
    assert begin("a", "b") == [measure.QUICKLY]
    seconds = 0.5
    assert begin("a", "b") == []
    assert [speed.memory for speed in used[-1]] == [speed.memory for speed in speeds]  # those that are kept
    seconds = 150.0
    assert begin("a", "b", threads=2) == [1.0]  # what was measured in a glance is not enough
    assert begin("a", "b", threads=2) == []
    source.path = tmp_path / "other"
    assert begin("a", "b") == [measure.QUICKLY, 1.0]
    assert begin("a", "b") == []
    notes = list((tmp_path / "speeds").iterdir())
    for note in notes:
        os.utime(note, (0, time.time() - speed_notes.KEPT - 1))
    assert begin("a", "b") == [measure.QUICKLY, 1.0]
    (left,) = (tmp_path / "speeds").iterdir()  # the others have gone
    left.write_bytes(b"{")
    assert begin("a", "b") == [measure.QUICKLY, 1.0]
    monkeypatch.setenv("MPILLM_CACHE", str(left))  # where nothing can be written
    assert begin("a", "b") == begin("a", "b") == [measure.QUICKLY, 1.0]


@pytest.mark.parametrize(("lost", "stages"), [(0, None), (1, 1)])
def test_a_layout_that_the_ranks_left_do_not_have_becomes_an_automatic_one(
    lost: int, stages: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a rank is lost before the run has begun."""

    class Layouts:
        def __init__(self, job: spec.Spec, *_: object) -> None:
            self.spec = job

        def choose(self, machines: Machines) -> Any:
            if self.spec.layout.stages == 3:
                raise LayoutError("needs 3 ranks")
            return SimpleNamespace(chosen=Chosen((Replica(0, 1, 1),), ""), time=SimpleNamespace(seconds=0.1))

    monkeypatch.setattr(laying_out, "Layouts", Layouts)
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path))
    job: Any = spec.load(None, ("layout.stages=3",), model="model", input="in", output="out")
    world: Any = World()
    world.lost, world.nodes.ranks_per_host = lost, [2]
    planner: Any = SimpleNamespace(source=None)
    layout = LayoutChoice(world, job, lambda: planner, lambda: NO_INPUT, None, True, False)
    with nullcontext() if lost else pytest.raises(LayoutError, match="needs 3 ranks"):
        assert layout.first(1).chosen.replicas[0].stages == stages
