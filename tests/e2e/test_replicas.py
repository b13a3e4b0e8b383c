"""Several copies of the model compute one job: the same bytes as one gives, whoever is lost or stopped meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Mpi, run_bounded
from tests.e2e.jobs import assert_one_sentence, command, mixed_lines, results, run, write_lines

pytestmark = pytest.mark.mpiexec
DYING = Path(__file__).with_name("dying.py")
REPLICAS = "layout.replicas=2"
RESULT, PART = b"\xa6result", b"\xa4part"  # kinds of a journal's records


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = mixed_lines(40, seed=11, tokens=24)
    lines[7]["body"]["messages"] = []  # an error of that line
    return write_lines(tmp_path_factory.mktemp("input") / "requests.jsonl", lines)


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process without mpiexec."""
    output = tmp_path_factory.mktemp("alone") / "out"
    done = run_bounded([sys.executable, *command(source, output)])
    assert done.returncode == 1, done.stderr
    return output


def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def assert_same_results(one: Path, other: Path) -> None:
    for name in ("results.jsonl", "results.h5"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def assert_memory_as_planned(found: dict[str, Any]) -> None:
    for rank in found["ranks"]:
        assert rank["memory_peak"] <= sum(rank["memory"].values()), rank


def test_the_same_bytes_under_each_mpi(mpi: Mpi, source: Path, alone: Path, tmp_path: Path) -> None:
    ranks, places = (2, [(0, 0), (1, 0)]) if mpi.name == "mpich" else (3, [(0, 0), (0, 1), (1, 0)])
    done = run(mpi, ranks, source, tmp_path / "out", REPLICAS, "batch.max_num_seqs=4")
    assert done.returncode == 1, done.stderr
    assert_same_results(alone, tmp_path / "out")
    ours, theirs = report(tmp_path / "out"), report(alone)
    assert [(rank["replica"], rank["stage"]) for rank in ours["ranks"]] == places
    assert ours["replicas"] == 2
    assert_memory_as_planned(ours)
    assert ours["tokens"]["generated"] == theirs["tokens"]["generated"]
    assert ours["tokens"]["prompt"] == theirs["tokens"]["prompt"]
    # Both have computed: the other leader has had lines, and rank 0 answers.
    for rank in (0, ranks - 1):
        assert ours["ranks"][rank]["messages"]["requests"]["bytes_received"] > 1000
        assert ours["ranks"][rank]["kv"]["bytes"] > 0


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        pytest.param("0:step:9:SIGKILL", 2, id="rank 0"),
        pytest.param("1:step:9:SIGKILL,2:step:9:SIGKILL", 1, id="a follower and a leader"),
    ],
)
def test_the_others_compute_what_a_lost_replica_had(
    plan: str, left: int, source: Path, alone: Path, openmpi: Mpi, tmp_path: Path
) -> None:
    words = command(source, tmp_path / "out", REPLICAS, "batch.max_num_seqs=4")[2:]
    mpiexec, *start = openmpi.command(3, DYING, plan, *words)
    env = openmpi.environment(MPILLM_DEADLINE="8")
    done = run_bounded([mpiexec, "--with-ft", "ulfm", *start], env=env)
    assert done.returncode == 1, done.stderr
    assert re.search(r"^mpillm: Lost rank [012] on .* continued after ", done.stderr, re.MULTILINE), (
        done.stderr
    )
    assert_same_results(alone, tmp_path / "out")
    found = report(tmp_path / "out")
    assert found["replicas"] == left
    assert_memory_as_planned(found)  # the peaks are those of both sessions: little of the first may stay


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on(
    number: signal.Signals, source: Path, alone: Path, openmpi: Mpi, tmp_path: Path
) -> None:
    """On another number of replicas. What both had when the signal came is kept; after a kill, what was on disk."""
    output = tmp_path / "out"
    words = command(source, output, REPLICAS, "batch.max_num_seqs=1", "job.checkpoint_tokens=4")[2:]
    slow = ",".join(f"{rank}:step:1:SLOW" for rank in range(3))
    start = openmpi.command(3, DYING, slow, *words)
    with subprocess.Popen(start, env=openmpi.environment(), stderr=subprocess.PIPE, text=True) as process:
        while records(output) < 5:
            assert process.poll() is None
            time.sleep(0.02)
        ranks = psutil.Process(process.pid).children(recursive=True)
        for one in ranks if number is signal.SIGKILL else []:
            with contextlib.suppress(psutil.Error):
                one.kill()
        if number is signal.SIGTERM:
            os.kill(process.pid, number)
        _, said = process.communicate()
    assert process.returncode != 0
    assert "Traceback" not in said
    kept = records(output)
    assert kept >= 5
    assert not (output / "results.jsonl").exists()
    done = run(openmpi, 2, source, output, REPLICAS)
    assert done.returncode == 1, done.stderr
    assert_same_results(alone, output)
    generated = report(output)["tokens"]["generated"]
    assert 0 < generated < report(alone)["tokens"]["generated"]


def records(output: Path, *kinds: bytes) -> int:
    """Results, and parts of them, that are on disk; or only those kinds of records."""
    journal = output / "journal"
    data = journal.read_bytes() if journal.exists() else b""
    return sum(data.count(b"\xa4type" + kind) for kind in kinds or (RESULT, PART))


def test_what_cannot_be_is_said_once(openmpi: Mpi, source: Path, tmp_path: Path) -> None:
    done = run(openmpi, 2, source, tmp_path / "out", "layout.replicas=3")
    assert_one_sentence(done, 2, "layout.replicas = 3 needs at least 3 ranks, and there are 2")


def test_an_error_of_another_replica_ends_the_run_and_keeps_what_there_is(
    openmpi: Mpi, source: Path, alone: Path, tmp_path: Path
) -> None:
    """The answers of a replica whose leader is told to stop are not lost, and rank 0 says why."""
    plan = "1:step:12:SIGTERM"
    words = command(source, tmp_path / "out", REPLICAS, "batch.max_num_seqs=2")[2:]
    mpiexec, *start = openmpi.command(2, DYING, plan, *words)
    done = run_bounded([mpiexec, *start], env=openmpi.environment())
    assert_one_sentence(done, 75, "Stopped by SIGTERM", "on rank 1")
    assert records(tmp_path / "out") > 0
    done = run(openmpi, 1, source, tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert_same_results(alone, tmp_path / "out")
    assert results(tmp_path / "out")[7]["error"] is not None
    assert report(tmp_path / "out")["requests"]["resumed"] > 0


@pytest.mark.parametrize("then", ["", "FAIL", "SIGKILL"], ids=["ready", "error", "death"])
def test_rank_0_answers_while_another_leader_gets_ready(
    mpi: Mpi, then: str, source: Path, alone: Path, tmp_path: Path
) -> None:
    """What becomes of the other leader then is as if rank 0 had waited for it."""
    killed = then == "SIGKILL"
    if killed and mpi.name == "mpich":
        pytest.skip("a run ends there with its first lost rank")
    output, ready = tmp_path / "out", tmp_path / "ready"
    plan = ",".join(f"1:open:1:{what}" for what in (then, "LATE") if what)
    words = command(source, output, REPLICAS, "batch.max_num_seqs=4")[2:]
    mpiexec, *start = mpi.command(2, DYING, plan, *words)
    options = ["--with-ft", "ulfm"] if killed else []
    env = mpi.environment(MPILLM_TEST_LATE=str(ready), MPILLM_DEADLINE="8")
    with subprocess.Popen([mpiexec, *options, *start], env=env, stderr=subprocess.PIPE, text=True) as process:
        while records(output) < 10:
            assert process.poll() is None
            time.sleep(0.02)
        ready.touch()
        _, said = process.communicate()
    if then == "FAIL":
        assert process.returncode == 2, said
        assert said.count("The model is gone.") == 1, said
        assert re.search(r"^mpillm: The model is gone\. \(on rank 1 of 2, host .+\)$", said, re.MULTILINE), (
            said
        )
        kept = records(output, RESULT)
        done = run(mpi, 2, source, output, REPLICAS)
        assert done.returncode == 1, done.stderr
        assert report(output)["requests"]["resumed"] == kept > 0
    else:
        assert process.returncode == 1, said
        assert ("Lost rank 1 on " in said) == killed, said
        assert report(output)["replicas"] == (1 if killed else 2)
    assert_same_results(alone, output)


@pytest.mark.parametrize(
    "plan", ["1:give:1:SLOW", "1:give:1:SIGKILL", "0:get:1:SIGKILL"], ids=["nobody", "giver", "rank 0"]
)
def test_a_slow_replica_gives_lines_back(mpi: Mpi, plan: str, tmp_path: Path) -> None:
    """Others go on with what it has generated of them; who is killed meanwhile loses nothing."""
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(32, seed=4, tokens=60))
    settings = [REPLICAS, "job.checkpoint_tokens=8"]
    words = command(source, tmp_path / "out", *settings)[2:]
    mpiexec, *start = mpi.command(2, DYING, f"1:step:1:SLOW,{plan}", *words)
    killed, goes_on = "KILL" in plan, mpi.name == "openmpi"
    options = ["--with-ft", "ulfm"] if killed and goes_on else []
    done = run_bounded([mpiexec, *options, *start], env=mpi.environment(MPILLM_DEADLINE="8"))
    assert bool(done.returncode) == (killed and not goes_on), done.stderr
    assert not killed or not goes_on or f"Lost rank {plan[0]} on " in done.stderr, done.stderr
    if done.returncode:
        done = run(mpi, 2, source, tmp_path / "out", *settings)
        assert done.returncode == 0, done.stderr
    alone = run_bounded([sys.executable, *command(source, tmp_path / "alone")])
    assert alone.returncode == 0, alone.stderr
    assert_same_results(tmp_path / "alone", tmp_path / "out")
    if not killed:
        ours, theirs = (report(tmp_path / name)["tokens"] for name in ("out", "alone"))
        assert ours.pop("recomputed") > theirs.pop("recomputed") == 0
        assert ours == theirs
