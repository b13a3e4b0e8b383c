"""The doctor: what it finds on two ranks, its exit code, and the file of hosts that it writes."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpillm.comm import core_speed, probe
from mpillm.comm.probe import tournament
from mpillm.kernels import BlockType
from mpillm.planning import hosts, kernel_rates, measure
from mpillm.planning.hosts import Host
from mpillm.planning.speed import ASSUMED, KINDS, LARGE, ROWS, Speed, stand_in
from tests.conftest import Mpi, run_bounded
from tests.model.golden import gguf_path

MODEL = gguf_path("llama_mixed")


@pytest.mark.mpiexec
def test_two_ranks_measure_and_the_file_is_read_again(openmpi: Mpi, tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    done = run_bounded(
        openmpi.command(2, "-m", "mpillm", "doctor", f"--model={MODEL}", f"--output={file}"),
        env=openmpi.environment(),
    )
    assert done.returncode == 0, done.stderr
    head, first, second = (
        line.split() for line in done.stdout.splitlines() if line.split()[:1] in (["rank"], ["0"], ["1"])
    )
    assert head == ["rank", "host", "cores", "threads", "kernels", "free", "products", "memory", "disk"]
    assert first[0] == "0"
    assert second[1] == first[1]
    assert f"model    {MODEL}: {MODEL.stat().st_size} bytes" in done.stdout
    assert f"network  rank 0 - rank 1 on {first[1]}: " in done.stdout
    assert "A run would work here." in done.stdout
    machines = hosts.read(file)
    assert machines.measured
    assert (list(machines.ranks_per_host), list(machines.names)) == ([2], [first[1]] * 2)
    for speed in machines.speeds:
        assert set(speed.products) == set(KINDS)
        assert speed.products["q4_0"][-1] == pytest.approx(
            (float(first[-3]) + float(second[-3])) / 2 * 1e9, rel=0.01
        )
        assert speed.latency > 0


def test_what_would_fail_has_an_exit_code(tmp_path: Path) -> None:
    wrong = tmp_path / "config.json"
    wrong.write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    done = run_bounded([sys.executable, "-m", "mpillm", "doctor", f"--model={tmp_path}"])
    assert done.returncode == 2
    assert "! model: rank 0 on " in done.stdout
    assert done.stdout.count("NoSuchModel") == 1, "said once"
    assert "A run would work here." not in done.stdout


@pytest.mark.parametrize("players", range(1, 10))
def test_everyone_meets_everyone_else_once(players: int) -> None:
    rounds = tournament(players)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(players), 2))
    for pairs in rounds:
        playing = [player for pair in pairs for player in pair]
        assert len(playing) == len(set(playing)) >= players - 1


def test_speeds_between_the_measured_rows_and_of_other_types() -> None:
    speed = Speed({"q4_0": (10.0, 40.0, 40.0), "bf16": (4.0, 8.0, 16.0)}, memory=1.0, disk=1.0)
    assert [speed.operations(BlockType.Q4_0, rows) for rows in (0.5, 1, 2, 4, 9, 500)] == pytest.approx(
        [10, 10, 20, 40, 40, 40]
    )
    assert speed.operations(BlockType.Q6_K, 1) == 10
    assert speed.operations(BlockType.F32, ROWS[-1]) == 16
    assert [stand_in(kind, KINDS) for kind in (BlockType.F16, BlockType.Q2_K, BlockType.Q8_0)] == [
        "bf16", "q4_0", "q8_0",
    ]  # fmt: skip


def test_a_file_of_hosts_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pi = Host(memory="7GiB", name='p"i', count=2, ranks=2, products={"q8_0": [2.0, 4.0, 6.0]},
              attention=[8.0, 10.0], disk_pages_gbs=0.2, core=0.3, part=0.5, mbit=100.0)  # fmt: skip
    file = tmp_path / "hosts.toml"
    hosts.write(file, [pi, Host(memory=2**30)])
    machines = hosts.read(file, 5)
    assert list(machines.names) == ['p"i (1)', 'p"i (1)', 'p"i (2)', 'p"i (2)', "host 3"]
    half = ASSUMED.shared_by(2)
    assert machines.speeds[0] == replace(
        half,
        products={"q8_0": (1e9, 2e9, 3e9)},
        attention=(4e9, 5e9),
        pages=1e8,
        core=0.3,
        part=0.5,
        wire=12.5e6,
    )
    assert machines.speeds[4] == ASSUMED
    assert not machines.measured


def test_a_disk_is_read_past_the_page_cache_or_its_pages_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_bytes(bytes(3 * LARGE))
    past = measure._disk_rate(file)
    assert min(past.rate, past.pages) > 0
    monkeypatch.setattr(measure, "open_direct", lambda path: -1)
    found = measure._disk_rate(file, 1, 2)
    assert (found.rate > 0, found.how) == (True, "pages dropped first")
    assert measure._disk_rate(file, 1, 4).how == "the file is too small"


def _world() -> Any:
    """Rank 0 of two ranks on a host each; it measures alone."""
    nodes = SimpleNamespace(numbers=[0, 1], free=[2**30] * 2, part_by_quota=lambda threads: 1.0)
    return SimpleNamespace(rank=0, size=2, nodes=nodes, barrier=lambda: None, gather=lambda own: [own])


@pytest.mark.parametrize(
    ("kept", "effort", "read"), [(True, 0.08, False), (True, 1.0, True), (False, 0.08, True)]
)
def test_a_brief_measurement_reads_no_disk_if_the_page_cache_has_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool, effort: float, read: bool
) -> None:
    """Weights that do not stay in memory are read again, which may push the file out of the page cache."""
    file = tmp_path / "model"
    file.write_bytes(bytes(3 * LARGE))
    rates = kernel_rates.KernelRates({}, 7e9, (1.0, 1.0), 1.0, 1.0, 1.0)
    monkeypatch.setattr(measure, "kernel_rates", lambda *_: rates)
    monkeypatch.setattr(measure, "_disk_rate", lambda *_: measure.DiskRate(1e9))
    for known in (True, False):
        monkeypatch.setattr(measure, "cached", lambda *_, known=known: known)
        (found,) = measure.everyone(_world(), ["q4_0"], 1, file, effort=effort, kept=kept)
        assert found.disk.rate == (1e9 if read or not known else 7e9)


def test_a_brief_measurement_is_of_the_type_of_most_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Products of other types are as much faster or slower as they are assumed to be."""
    file = tmp_path / "model"
    file.write_bytes(bytes(LARGE))
    tensors = {
        number: SimpleNamespace(type=kind, shape=shape)
        for number, (kind, shape) in enumerate(
            [
                (BlockType.Q8_0, (100, 50)),
                (BlockType.Q4_0, (100, 100)),
                (BlockType.Q4_1, (100, 100)),
                (BlockType.F32, (10**6,)),
            ]
        )
    }
    source: Any = SimpleNamespace(tensors=tensors, files=[file], loading_nbytes=0)
    rates = kernel_rates.KernelRates({"q4_0": [7e9, 15e9, 20e9]}, 7e9, (1.0, 1.0), 1.0, 1.0, 1.0)
    asked: list[Sequence[str]] = []

    def measured(kinds: Sequence[str], *_: Any) -> kernel_rates.KernelRates:
        asked.append(kinds)
        return rates

    monkeypatch.setattr(measure, "kernel_rates", measured)
    (speed,) = measure.speeds(_world(), source, 1, measure.QUICKLY)
    assert asked == [["q4_0"]]
    assert speed.products == {"q4_0": [7e9, 15e9, 20e9], "q8_0": pytest.approx([3.6e9, 10e9, 15e9])}
    links = [probe.LinkTiming((0, 1), 1e-4, 1e7)]
    for found in measure.linked(_world(), [speed, speed], links):
        assert (found.latency, found.wire, found.memory) == (1e-4, 1e7, 7e9)


def test_a_timing_ends_however_short_its_call_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))  # each look at the time takes a millisecond
    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(core_speed.time, name, lambda: next(clock) / 1000)
    calls: list[int] = []
    assert core_speed.typical(calls.append, [0, 1, 2], 0.06) == pytest.approx(0.001)
    assert calls[:5] == [0, 0, 1, 2, 0]
    assert core_speed.CALLS < len(calls) <= 0.06 * 1000
    calls.clear()
    core_speed.typical(calls.append, [0], 0.006)
    assert len(calls) <= 1 + core_speed.CALLS


def test_a_timing_on_a_core_that_was_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first call, for longer than all of them may take: there is one call nevertheless."""
    passed = itertools.chain([0.0], itertools.count(10.0, 10.0))
    monkeypatch.setattr(core_speed.time, "perf_counter", lambda: next(passed))
    assert core_speed.typical(core_speed.plain_code, [100], 0.001) > 0


def test_what_a_kernel_gives_is_measured() -> None:
    rates = kernel_rates.kernel_rates(["q4_0"], 1, 2**23)
    assert min(*rates.products["q4_0"], *rates.attention, rates.values, rates.fill, rates.core) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_little_memory_is_enough_to_measure_with(kind: str) -> None:
    """Fewer rows of a matrix, and fewer keys: a tiny model's rank is planned to take no more in the whole run."""
    rates = kernel_rates.kernel_rates([kind], 1, measure.LATER, 0.05)
    assert min(*rates.products[kind], *rates.attention, rates.values, rates.memory) > 0
    keys = (
        kernel_rates.SEQUENCES * kernel_rates.KV_HEADS * kernel_rates.HEAD_DIM * 2 * 2
    )  # and values, of a token
    assert kernel_rates._context(measure.LATER) * keys <= measure.LATER
    assert kernel_rates._context(measure.WITHIN_RUN) == kernel_rates.CONTEXT


@pytest.mark.parametrize(("mbit", "large"), [(10, False), (1000, True)])
@pytest.mark.parametrize(("effort", "part"), [(1.0, 1), (measure.QUICKLY, 4)])
def test_slow_links_are_measured_with_smaller_messages(
    monkeypatch: pytest.MonkeyPatch, mbit: int, large: bool, effort: float, part: int
) -> None:
    """One of a MiB takes two seconds there and back at 10 Mbit/s, and all ranks wait for it."""
    sizes: list[int] = []

    def round_trip(world: Any, other: int, nbytes: int, rounds: int, patience: float) -> float:
        sizes.append(nbytes)
        return 2 * (60e-6 + nbytes / (mbit * 125_000))

    monkeypatch.setattr(probe, "_round_trip", round_trip)
    monkeypatch.setattr(probe, "_wait", lambda world, request: None)
    world: Any = SimpleNamespace(comm=SimpleNamespace(Isend=lambda *_: None))
    latency, bandwidth = probe._time_link(world, 1, effort)
    assert (latency, bandwidth) == (pytest.approx(60e-6, rel=0.1), pytest.approx(mbit * 125_000, rel=0.001))
    assert sizes == [probe.SMALL, probe.MIDDLE // part, *([probe.LARGE // part] if large else [])]


@pytest.mark.parametrize(("patience", "rounds"), [(0.0, 2), (0.0045, 5), (1.0, 10)])
def test_links_are_measured_for_as_long_as_there_is_time(
    monkeypatch: pytest.MonkeyPatch, patience: float, rounds: int
) -> None:
    """Each message takes half a millisecond; of two round trips at least, the first does not count."""
    sent, clock = list[int](), [0.0]

    def wait(world: Any, request: None) -> None:
        clock[0] += 0.5e-3

    monkeypatch.setattr(probe, "_wait", wait)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: clock[0])
    world: Any = SimpleNamespace(
        comm=SimpleNamespace(Isend=lambda *of: sent.append(1), Irecv=lambda *_: None)
    )
    assert probe._round_trip(world, 1, 4, 9, patience) == pytest.approx(1e-3)
    assert len(sent) == rounds


def test_a_host_with_a_quota_measures_as_slow_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls take as long as elsewhere, for between the pauses it has a whole core."""
    assert kernel_rates.part_of_core(0.33, 1.0, lambda: 0.32) == pytest.approx(0.32)
    assert kernel_rates.part_of_core(0.6, 1.0, lambda: 0.33) == pytest.approx(0.33)  # not of whole periods
    assert kernel_rates.part_of_core(0.6, 1.0, lambda: 0.99) == 1.0  # it was noise
    assert kernel_rates.part_of_core(0.95, 1.0, pytest.fail) == 1.0
    assert kernel_rates.part_of_core(0.4, 1.0, pytest.fail, 0.33) == 0.33  # the known quota explains it
    assert kernel_rates.part_of_core(0.2, 1.0, lambda: 0.2, 0.33) == 0.2  # and others compute besides
    monkeypatch.setattr(kernel_rates.time, "thread_time", lambda: 0.25 * time.perf_counter())
    for module in (core_speed, kernel_rates):
        monkeypatch.setattr(module, "typical", lambda *_: 1.0)
    monkeypatch.setattr(kernel_rates, "_fill", lambda *_: 1e9)
    slow = kernel_rates.kernel_rates(["q4_0"], 1, 2**23)
    monkeypatch.setattr(kernel_rates.time, "thread_time", time.perf_counter)
    whole = kernel_rates.kernel_rates(["q4_0"], 1, 2**23)
    assert slow.core / whole.core == pytest.approx(0.25, rel=0.2)
    assert slow.fill / whole.fill == pytest.approx(0.25, rel=0.2)
    assert slow.products["q4_0"][0] / whole.products["q4_0"][0] == pytest.approx(0.25, rel=0.2)
    known = kernel_rates.kernel_rates(["q4_0"], 1, 2**23, quota=0.5)  # a short measurement may miss it
    assert known.core / whole.core == pytest.approx(0.5, rel=0.2)


def test_a_call_that_is_stopped_takes_no_longer_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count twice: ranks that share a core have half of it, and their long calls are always stopped."""
    used = 0.0

    def work(_: int) -> None:
        nonlocal used
        used += 0.02

    clocks = SimpleNamespace(thread_time=lambda: used, perf_counter=lambda: 2 * used)
    monkeypatch.setattr(core_speed, "time", clocks)
    assert core_speed.typical(work, [0], 0.06) == pytest.approx(0.02)


def test_ranks_that_share_cores_look_at_the_same_time_how_much_each_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever looked when the others were done would have a whole core."""
    done: list[str] = []
    monkeypatch.setattr(kernel_rates, "_measured_part", lambda: done.append("looked") or 1.0)
    monkeypatch.setattr(kernel_rates.time, "thread_time", lambda: 0.25 * time.perf_counter())
    kernel_rates.kernel_rates(["q4_0"], 1, 2**23, 0.1, meet=lambda: done.append("met"))
    assert done == ["met", "looked"]
