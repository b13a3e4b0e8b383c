"""`run --trace`: the file is JSON, its spans nest, and they sum to the numbers of the report."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from mpillm import tracing
from mpillm.comm.counters import WAITED_FOR
from tests.conftest import HANGS, Mpi
from tests.e2e.jobs import assert_one_sentence, command, mixed_lines, write_lines
from tests.e2e.test_resume import start, wait_for_results

Event = dict[str, Any]


def events(path: Path) -> tuple[list[Event], Event]:
    """The spans of a trace, and what it says of itself."""
    read = json.loads(path.read_text())
    return [event for event in read["traceEvents"] if event["ph"] == "X"], read["otherData"]


def assert_nested(spans: list[Event]) -> None:
    """Spans of one thread lie inside each other or apart."""
    threads = defaultdict(list)
    for span in spans:
        threads[span["pid"], span["tid"]].append((span["ts"], -span["dur"], span["name"]))
    for thread in threads.values():
        ends: list[float] = []
        for begin, negative, name in sorted(thread):
            while ends and ends[-1] <= begin + 1e-3:
                ends.pop()
            end = begin - negative
            assert not ends or end <= ends[-1] + 1e-3, name
            ends.append(end)


def assert_trace_events(path: Path, ranks: int) -> None:
    """A file as Chrome's Trace Event Format has it, with a process for each rank, all of whose threads have names."""
    read = json.loads(path.read_text())
    assert read.keys() == {"displayTimeUnit", "traceEvents", "otherData"}
    assert read["displayTimeUnit"] == "ms"  # how times are shown; those of events are microseconds
    processes, threads, used = dict[int, str](), dict[tuple[int, int], str](), set[tuple[int, int]]()
    for event in read["traceEvents"]:
        assert type(event["pid"]) is type(event["tid"]) is int
        assert type(event["name"]) is str
        place = event["pid"], event["tid"]
        if event["ph"] == "M":
            assert event.keys() == {"ph", "name", "pid", "tid", "args"}
            assert event["args"].keys() == {"name"}
            names = {"process_name": processes, "thread_name": threads}[event["name"]]
            key = event["pid"] if names is processes else place
            assert key not in names, "named twice"
            names[key] = event["args"]["name"]  # type: ignore[index]
        else:
            assert event["ph"] == "X"
            assert event.keys() - {"args"} == {"ph", "name", "pid", "tid", "ts", "dur"}
            assert min(event["ts"], event["dur"]) >= 0
            assert all(type(detail) in (int, str) for detail in event.get("args", {}).values())
            assert place in threads, "named before its first span"
            used.add(place)
    assert processes.keys() == set(
        range(1, ranks + 1)
    )  # Perfetto takes process 0 and thread 0 for the kernel's
    assert used == threads.keys()
    assert min(thread for _, thread in threads) == 1
    assert {name for (_, thread), name in threads.items() if thread == 1} == {"MainThread"}
    assert all(processes.values())
    assert all(threads.values())


def of_rank(span: Event, rank: int) -> bool:
    return bool(span["pid"] == rank + 1)


def seconds(spans: list[Event], rank: int, *names: str) -> float:
    return sum(span["dur"] for span in spans if of_rank(span, rank) and span["name"] in names) / 1e6


@pytest.mark.mpiexec
def test_spans_nest_and_sum_to_the_report(openmpi: Mpi, tmp_path: Path) -> None:
    source, trace = write_lines(tmp_path / "in.jsonl", mixed_lines(9, 4)), tmp_path / "trace.json"
    words = command(source, tmp_path / "out", "memory.weights=24KiB")
    began = time.monotonic()
    done = openmpi.run(2, *words, "--trace", str(trace))
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    spans, said = events(trace)
    assert_nested(spans)
    assert_trace_events(trace, 2)
    # Microseconds: those of the first span to the last are no more than the command took.
    assert 0 < max(span["ts"] + span["dur"] for span in spans) / 1e6 < took
    for rank in (0, 1):
        starts = [span["ts"] for span in spans if of_rank(span, rank)]
        assert starts == sorted(starts)
    report = json.loads((tmp_path / "out/report.json").read_text())
    steps = ("decode", "prefill", "prefill and decode")
    assert sum(span["name"] in steps for span in spans if of_rank(span, 0)) == report["batch"]["steps"]
    for rank, trace_of in zip(report["ranks"], said["ranks"], strict=True):
        number = rank["rank"]
        assert (trace_of["rank"], trace_of["host"], trace_of["kept"]) == (
            number,
            rank["host"],
            trace_of["spans"],
        )
        for kind, count in rank["messages"].items():
            assert seconds(spans, number, f"wait for {WAITED_FOR[kind]}") == pytest.approx(
                count["seconds"], abs=1e-4
            )
        weights = rank["weights"]
        assert seconds(spans, number, "load") == pytest.approx(weights["load_seconds"], abs=1e-4)
        assert seconds(spans, number, "wait for weights") == pytest.approx(weights["stall_seconds"], abs=1e-4)
        loads = [span for span in spans if of_rank(span, number) and span["name"] == "load"]
        assert len(loads) == weights["loads"] > 0
        assert sum(span["args"]["bytes"] for span in loads) == weights["loaded"]
        waits = ("wait for other shards", "wait for other stages", "wait for weights")
        inside = seconds(spans, number, *steps) - seconds(spans, number, *waits)
        assert rank["seconds"]["compute"] == pytest.approx(inside, abs=1e-4)
    for phase, length in report["phases"].items():
        assert seconds(spans, 0, phase) == pytest.approx(length, abs=1e-4)
    assert seconds(spans, 0, "tokenize") > 0
    assert any(span["name"] == "disk read" for span in spans)


@pytest.mark.mpiexec
def test_a_run_that_is_interrupted_writes_the_trace_of_rank_0(mpi: Mpi, tmp_path: Path) -> None:
    source, trace = write_lines(tmp_path / "in.jsonl", mixed_lines(400, tokens=60)), tmp_path / "trace.json"
    launcher = start(
        mpi, 2, [*command(source, tmp_path / "out", "batch.max_num_seqs=2"), "--trace", str(trace)]
    )
    try:
        wait_for_results(tmp_path / "out/journal", launcher, 4000)
        os.kill(launcher.pid, signal.SIGTERM)
        assert launcher.wait(HANGS) != 0
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    spans, said = events(trace)
    assert_nested(spans)
    assert_trace_events(trace, 1)
    assert [rank["rank"] for rank in said["ranks"]] == [0]
    assert any(span["name"] == "decode" for span in spans)


@pytest.mark.mpiexec
def test_a_trace_that_could_not_be_written_is_said_before_anything_is_computed(
    openmpi: Mpi, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(2))
    done = openmpi.run(1, *command(source, tmp_path / "out"), "--trace", str(tmp_path / "none/trace.json"))
    assert_one_sentence(done, 2, "--trace", "in a directory that exists and can be written")
    assert not (tmp_path / "out").exists()


def test_only_the_last_spans_are_kept_and_all_are_counted() -> None:
    recorder = tracing.start(3)
    try:
        for number in range(5):
            tracing.add("a step", float(number), 0.5, step=number)
        with tracing.span("inside"):
            pass
    finally:
        tracing.stop()
    tracing.add("a step", 9.0, 0.5)
    assert [span.detail.get("step") for span in recorder.spans] == [3, 4, None]
    assert (recorder.sums["a step"].count, recorder.sums["a step"].seconds) == (5, 2.5)
    assert not tracing.active()
