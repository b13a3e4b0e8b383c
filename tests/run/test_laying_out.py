"""How a run that begins is laid out: how long it measures its hosts."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpillm import spec
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
    """Rank 0's."""

    def __init__(self, *places: str) -> None:
        self.nodes, self.together = SimpleNamespace(places=places), nullcontext
        self.rank, self.host = 0, "here"

    def on_rank_0(self, work: Any) -> Any:
        return work()


@pytest.mark.parametrize(
    ("assumed", "measured", "efforts"),
    [
        (0.5, 0.5, []),
        (5.0, 4.0, [measure.QUICKLY]),
        (5.0, 50.0, [measure.QUICKLY, 1.0]),  # the hosts are slower than assumed
        (50.0, 4.0, [measure.QUICKLY]),
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

    def machines(world: World, source: None, threads: int, effort: float, budget: None) -> Machines:
        made.append(effort)
        return TWO_HOSTS

    monkeypatch.setattr(LayoutChoice, "_search", searched)
    monkeypatch.setattr(laying_out, "alone_on_first", lambda *_: None)
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path))
    monkeypatch.setattr(LayoutChoice, "_known_machines", lambda self: TWO_HOSTS)
    monkeypatch.setattr(measure, "machines", machines)
    job: Any = spec.load(None, (), model="model", input="in", output="out")
    nothing: Any = None
    source: Any = SimpleNamespace(path=tmp_path / "model")
    world: Any = World()
    LayoutChoice(world, job, source, nothing, NO_INPUT, None, True, True).first(1)
    assert made == efforts


def test_later_runs_on_the_same_hosts_do_not_measure_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    used: list[list[Speed]] = []
    speeds = [ASSUMED.shared_by(1), ASSUMED.shared_by(3)]

    def searched(self: LayoutChoice, job: spec.Spec, machines: Machines, worth: float = 1.0) -> LaidOut:
        used.append(list(machines.speeds))
        return LaidOut(Chosen((Replica(0, 2, 1),), ""), TWO_HOSTS, range(2), seconds)

    def machines(world: World, source: None, threads: int, effort: float, budget: None) -> Machines:
        made.append(effort)
        return replace(TWO_HOSTS, speeds=speeds, measured=True)

    monkeypatch.setattr(LayoutChoice, "_search", searched)
    monkeypatch.setattr(laying_out, "alone_on_first", lambda *_: None)
    monkeypatch.setenv("MPILLM_CACHE", str(tmp_path))
    for name in ("_known_machines", "_machines"):
        monkeypatch.setattr(LayoutChoice, name, lambda self: TWO_HOSTS)
    monkeypatch.setattr(measure, "machines", machines)
    job: Any = spec.load(None, (), model="model", input="in", output="out")
    nothing: Any = None
    source: Any = SimpleNamespace(path=tmp_path / "model")

    def begin(*places: str, threads: int = 1) -> list[float]:
        made.clear()
        world: Any = World(*places)
        LayoutChoice(world, job, source, nothing, NO_INPUT, None, True, True).first(threads)
        return list(made)

    seconds = 5.0
    assert begin("a", "b") == [measure.QUICKLY]
    assert begin("a", "b") == []
    assert [speed.memory for speed in used[-1]] == [speed.memory for speed in speeds]
    assert begin("a", "c") == begin("a", "b", threads=2) == [measure.QUICKLY]
    assert begin("a", "b") == []
    seconds = 50.0
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


@pytest.mark.parametrize(
    ("alone", "together", "ranks"),
    [
        (2.0, 1.9, 1),  # it is over before others could be measured
        (2.0, 1.0, 2),
        (5.0, 5.0, 2),  # long enough to look whether they are faster
        (None, 1.0, 2),  # one host cannot hold it
    ],
)
def test_a_job_of_seconds_is_for_one_host(
    monkeypatch: pytest.MonkeyPatch, alone: float | None, together: float, ranks: int
) -> None:
    one, two = Chosen((Replica(0, 1, 1),), ""), Chosen((Replica(0, 1, 1), Replica(1, 1, 1)), "")
    found = SimpleNamespace(chosen=one, time=SimpleNamespace(seconds=alone))
    monkeypatch.setattr(laying_out, "alone_on_first", lambda *_: found if alone else None)
    monkeypatch.setattr(LayoutChoice, "_search", lambda *_: LaidOut(two, TWO_HOSTS, range(2), together))
    monkeypatch.setattr(LayoutChoice, "_known_machines", lambda self: replace(TWO_HOSTS, names=("a", "b")))
    job: Any = spec.load(None, (), model="model", input="in", output="out")
    nothing: Any = None
    world: Any = World()
    made = LayoutChoice(world, job, nothing, nothing, NO_INPUT, None, True, True)._unmeasured()
    assert len(made.ranks) == len(made.chosen.replicas) == ranks
    said = "b is left out and kept in reserve: this run is too short for several hosts." if ranks == 1 else ""
    assert made.left_out == said
