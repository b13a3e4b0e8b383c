"""Killed in the middle: the same command goes on, and ends in the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import psutil
import pytest

from mpillm.store import report
from tests.conftest import HANGS, Mpi, clean_environment, get_mpi, run_bounded
from tests.e2e.jobs import command, mixed_lines, results, run, write_lines
from tests.model.golden import FIXTURES

pytestmark = pytest.mark.mpiexec


def start(mpi: Mpi, ranks: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(word) for word in mpi.command(ranks, *arguments)],
        env=mpi.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


# What some answers are held to, by the keys of their bodies.
HELD: dict[str, Any] = {
    "guided_choice": ["positive", "negative", "neutral"],
    "guided_regex": "[a-f]{4}( fox| dog){6,9}",
    "guided_json": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
}


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Python processes below mpiexec."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in below if "mpillm" in process.cmdline() and "-m" in process.cmdline()]


def wait_for_results(journal: Path, launcher: subprocess.Popen[Any], nbytes: int) -> None:
    """Until the journal has grown past its beginning, and so holds some results."""
    begin = None
    while launcher.poll() is None:
        size = journal.stat().st_size if journal.exists() else 0
        begin = size if begin is None and size else begin
        if begin is not None and size > begin + nbytes:
            return
        time.sleep(0.01)
    pytest.fail("the run ended before it could be disturbed")


def undisturbed_run(folder: Path, lines: list[dict[str, Any]], *settings: str) -> Path:
    done = run(get_mpi("openmpi"), 1, write_lines(folder / "in.jsonl", lines), folder / "out", *settings)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def mixed_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = mixed_lines(100, seed=4, tokens=60)
    return undisturbed_run(tmp_path_factory.mktemp("mixed"), lines, "batch.speculation=off")


@pytest.mark.parametrize(
    ("victim", "number"), [("rank 1", signal.SIGKILL), ("rank 0", signal.SIGKILL), ("all", signal.SIGTERM)]
)
def test_goes_on_after(
    victim: str, number: signal.Signals, mpi: Mpi, mixed_undisturbed: Path, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(100, seed=4, tokens=60))
    output, settings = tmp_path / "out", ["batch.max_num_seqs=4", "batch.speculation=prompt-lookup"]
    launcher = start(mpi, 2, command(source, output, *settings))
    try:
        wait_for_results(output / "journal", launcher, 4000)
        victims = ranks_of(launcher)
        assert len(victims) == 2
        if victim == "all":
            os.kill(launcher.pid, number)
        else:
            victims[int(victim[-1])].send_signal(number)
        assert launcher.wait() != 0
        _, alive = psutil.wait_procs(victims, timeout=HANGS)
        assert not alive, "a rank was left behind"
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert not (output / "results.jsonl").exists()
    again = run(mpi, 2, source, output, *settings)
    assert again.returncode == 0, again.stderr
    assert "by earlier runs" in again.stderr
    made = report.read(output)
    assert len(made.earlier) == 1
    assert made.earlier[0].tokens.generated > 0
    everything = made.all_starts().tokens
    with h5py.File(output / "results.h5") as h5:
        assert everything.generated >= len(h5["tokens/ids"]) > made.tokens.generated
    assert everything.prompt > made.tokens.prompt
    said = f"With 1 earlier start of this command: {everything.prompt} prompt and {everything.generated} generated"
    assert said in again.stderr
    assert made.batch.accepted > 0
    for name in ("results.jsonl", "results.h5"):
        assert (output / name).read_bytes() == (mixed_undisturbed / name).read_bytes()


def long_lines() -> list[dict[str, Any]]:
    """A short answer, and long ones of every kind: stop strings, echoes, choices, penalties, adapters."""
    prompt, warm = {"prompt": "the quick brown fox", "ignore_eos": True}, {"temperature": 1.2, "logprobs": 2}
    chat = {
        "messages": [{"role": "user", "content": "a lazy dog"}],
        "stop": ["never to be seen"],
        "logprobs": True,
    }
    bodies: list[dict[str, Any]] = [
        {**prompt, "max_tokens": 40},
        {**chat, "model": "some", "max_tokens": 200, "ignore_eos": True, "top_logprobs": 3},
        {**prompt, **warm, "max_tokens": 220, "echo": True, "n": 2},
        {**prompt, **warm, "max_tokens": 240, "n": 3, "stop_token_ids": list(range(7, 300, 90))},
        {**prompt, "model": "all", "max_tokens": 250, "repetition_penalty": 1.2},
    ]
    return [{"custom_id": str(number), **body} for number, body in enumerate(bodies)]


ADAPTERS = [
    "layout.threads=1",
    *(f"adapters.{name}={FIXTURES / 'adapters' / f'chat_{name}'}" for name in ("all", "some")),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the long lines give at a stretch."""
    settings = ("job.checkpoint_tokens=0", *ADAPTERS)
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"), long_lines(), *settings)


@pytest.mark.parametrize(("every", "number"), [(16, signal.SIGKILL), (100_000, signal.SIGUSR1)])
def test_long_answers_go_on_from_their_middle(
    every: int, number: signal.Signals, undisturbed: Path, openmpi: Mpi, tmp_path: Path
) -> None:
    """Killed, they lose what came after the last checkpoint; who is warned ahead saves everything."""
    source, output = write_lines(tmp_path / "in.jsonl", long_lines()), tmp_path / "out"
    settings = [f"job.checkpoint_tokens={every}", *ADAPTERS]
    launcher = start(openmpi, 2, command(source, output, *settings))
    try:
        wait_for_results(output / "journal", launcher, 8000 if number == signal.SIGKILL else 10)
        launcher.send_signal(number)
        launcher.wait()
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert not (output / "results.jsonl").exists()
    again = run(openmpi, 2, source, output, *settings)
    assert again.returncode == 0, again.stderr
    for name in ("results.jsonl", "results.h5"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (output, undisturbed)]
    again_tokens, all_tokens = (report["tokens"]["generated"] for report in reports)
    assert again_tokens < all_tokens - 16


def test_other_shards_are_avoided_or_said(openmpi: Mpi, tmp_path: Path) -> None:
    """With Q8_0 sums; lines are added, so that each run has something to answer."""
    lines, output = mixed_lines(8), tmp_path / "out"
    said, layouts = [], []
    for count, ranks, shards in ((3, 1, "'auto'"), (5, 2, "'auto'"), (6, 2, "2"), (8, 2, "'auto'")):
        source = write_lines(tmp_path / "in.jsonl", lines[:count])
        done = run(openmpi, ranks, source, output, "wire.activations=q8_0", f"layout.shards={shards}")
        assert done.returncode in (0, 1), done.stderr
        report = json.loads((output / "report.json").read_text())
        said.append([line for line in report["warnings"] if "several layouts" in line])
        assert all(f"mpillm: {line}" in done.stderr for line in said[-1])
        layouts.append((report["stages"], report["shards"]))
    assert layouts == [(1, 1), (2, 1), (1, 2), (2, 1)]
    words = "With this [wire] the last digits of results depend on the layout (with f32 they would not)."
    assert said[:2] == [[], []]
    assert said[2] == [
        "Requests are answered on several layouts: 3 as 1 stage x 1 shard, 2 as 2 stages x 1 shard, "
        f"1 now as 1 stage x 2 shards. {words}"
    ]
    assert "1 as 1 stage x 2 shards, 2 now as 2 stages x 1 shard" in said[3][0]


def test_answers_outlive_the_memory_that_they_needed(openmpi: Mpi, tmp_path: Path) -> None:
    """A run that goes on with a KV cache of one block refuses long lines, but not those that are answered."""
    lines = [{"custom_id": "n\0l", "prompt": [5] * 90, "max_tokens": 2}, {"prompt": "a", "max_tokens": 2}]
    source, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out"
    assert run(openmpi, 1, source, output).returncode == 0
    before = (output / "results.jsonl").read_bytes().splitlines()
    write_lines(source, [*lines, {"prompt": [5] * 91, "max_tokens": 2}, {"prompt": "b", "max_tokens": 2}])
    again = run(openmpi, 1, source, output, "memory.kv=12000")
    assert again.returncode == 1, again.stderr
    after = (output / "results.jsonl").read_bytes().splitlines()
    assert after[:2] == before
    assert [json.loads(line)["response"]["status_code"] for line in after] == [200, 200, 400, 200]
    assert b"memory.kv" in after[2]


def test_answers_outlive_fewer_ranks_and_bad_lines(openmpi: Mpi, tmp_path: Path) -> None:
    """One rank holds fewer tokens than two stages do; bad lines come before, between and after the answered ones."""
    kv = "memory.kv=12000"
    old = [
        {"custom_id": "long", "prompt": [5] * 90, "max_tokens": 2},
        {"custom_id": "chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    ]
    source, output = write_lines(tmp_path / "in.jsonl", old), tmp_path / "out"
    assert run(openmpi, 2, source, output, kv, "layout.stages=2").returncode == 0
    before = (output / "results.jsonl").read_bytes().splitlines()
    bad = [
        {"custom_id": "first", "prompt": [10**6]},
        {"custom_id": "long, too", "prompt": [5] * 91, "max_tokens": 2},
        {"custom_id": "chat", "prompt": "whose name is another line's"},
        {"custom_id": "new", "prompt": "a", "max_tokens": 2},
    ]
    write_lines(source, [bad[0], old[0], bad[1], old[1], *bad[2:]])
    source.write_bytes(source.read_bytes() + b'{"custom_id": "long", \xff\n[]\n')
    again = run(openmpi, 1, source, output, kv)
    assert again.returncode == 1, again.stderr
    after = (output / "results.jsonl").read_bytes().splitlines()
    statuses = [json.loads(line)["response"]["status_code"] for line in after]
    assert statuses == [400, 200, 400, 200, 400, 200, 400, 400]
    assert [after[1], after[3]] == before
    assert b"raise memory.kv" in after[2]


def test_answers_that_obey_a_grammar_go_on(tmp_path: Path) -> None:
    """On one rank, killed while grammars are in the middle of answers."""
    body = {"prompt": "the fox", "max_tokens": 40, "temperature": 1.0}
    keys = list(HELD)
    lines = [{**body, "seed": n, keys[n % 3]: HELD[keys[n % 3]]} for n in range(24)]
    source, output = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out"
    settings = ["batch.max_num_seqs=2", "job.checkpoint_tokens=4", "batch.speculation=prompt-lookup"]
    words = [sys.executable, *command(source, output, *settings)]
    with subprocess.Popen(words, env=clean_environment(), stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_results(output / "journal", process, 1000)
        finally:
            process.kill()
    assert not (output / "results.jsonl").exists()
    again = run_bounded(words, env=clean_environment())
    assert again.returncode == 0, again.stderr
    assert "by earlier runs" in again.stderr
    whole = [sys.executable, *command(source, tmp_path / "whole", "batch.speculation=off")]
    assert run_bounded(whole, env=clean_environment()).returncode == 0
    assert (output / "results.jsonl").read_bytes() == (tmp_path / "whole/results.jsonl").read_bytes()
    texts = [one["response"]["body"]["choices"][0]["text"] for one in results(output)]
    assert set(texts[::3]) <= {*HELD["guided_choice"]}
    assert len(set(texts)) > 10
