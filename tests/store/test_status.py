"""`mpillm status`, `watch` and `compare`: read from outside, while a run goes on, after a kill and after its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpillm.errors import Interrupted, JobError
from mpillm.store import report
from mpillm.store.output import Claim
from mpillm.store.status import Reader
from tests.conftest import Mpi, clean_environment, run_bounded
from tests.e2e.jobs import command, mixed_lines, run, write_lines
from tests.e2e.test_resume import wait_for_results
from tests.job_helpers import CHAT

pytestmark = pytest.mark.mpiexec


def mpillm(*words: object) -> subprocess.CompletedProcess[str]:
    return run_bounded([sys.executable, "-m", "mpillm", *map(str, words)], env=clean_environment())


def status(output: Path) -> tuple[int, dict[str, object]]:
    done = mpillm("status", "--json", output)
    return done.returncode, json.loads(done.stdout)


def watcher(output: Path, says: str = " of 301 requests (") -> subprocess.Popen[str]:
    """`watch`, which has said a line."""
    watching = subprocess.Popen(
        [sys.executable, "-m", "mpillm", "watch", "--every", "1", str(output)],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    assert says in watching.stdout.readline()
    return watching


def left(watching: subprocess.Popen[str]) -> str:
    """What `watch` says when it is left by Ctrl-C."""
    watching.send_signal(signal.SIGINT)
    said, errors = watching.communicate()
    assert (watching.returncode, errors) == (75, "")
    return said


def test_a_run_is_seen_from_outside(openmpi: Mpi, tmp_path: Path) -> None:
    """Running, killed, and complete after a resume; looking at it changes nothing."""
    lines = [*mixed_lines(300, seed=9, tokens=60), {"custom_id": "bad", "prompt": 5}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out"
    waits = f"No run has started in {output} yet; waiting for one"
    assert left(watcher(output, waits)) == ""
    assert left(watcher(CHAT, "yet, and only a directory in it can become the output of one, because ")) == ""
    output.mkdir()  # as a job script does
    early = watcher(output, waits)
    launcher = subprocess.Popen(
        [str(word) for word in openmpi.command(1, *command(source, output, "batch.max_num_seqs=2"))],
        env=openmpi.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for_results(output / "journal", launcher, 4000)
        code, now = status(output)
        assert (code, now["state"], now["total"]) == (75, "running", 301)
        assert "process" in str(now["owner"])
        assert now["model"] == "model.safetensors"
        before = int(str(now["answered"]))
        assert 0 < before < 300
        watching = watcher(output)
        assert ": running by process" in left(watcher(output)), "Ctrl-C ends the watching, and not the run"
        _, later = status(output)
        assert isinstance(later["left"], float), "as the run itself tells"
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    for one in (early, watching):
        said, _ = one.communicate()
        assert one.returncode == 75
        assert ": stopped" in said
        assert "run its command again to continue" in said
    code, now = status(output)
    assert (code, now["state"], now["left"]) == (75, "stopped", None)
    assert before <= int(str(now["answered"])) < 300
    assert now["starts"] == 1
    first = int(str(now["generated_tokens"]))
    assert first > 0

    assert run(openmpi, 1, source, output).returncode == 1  # for the bad line
    code, now = status(output)
    assert (code, now["state"], now["answered"], now["errors"]) == (1, "complete", 301, 1)
    whole = report.read(output).all_starts().tokens
    assert now["starts"] == 2
    assert first < int(str(now["generated_tokens"])) == whole.generated
    assert now["prompt_tokens"] == whole.prompt - whole.shared
    assert "generated tokens in 0:00:" in mpillm("status", output).stdout


def test_new_records_alone_are_read_again(openmpi: Mpi, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(3, seed=1))
    assert run(openmpi, 1, source, tmp_path / "out").returncode == 0
    reader = Reader(tmp_path / "out")
    journal = tmp_path / "out/journal"
    whole = reader.look()
    assert (whole.state, whole.answered) == ("complete", 3)
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) // 2])  # a record is cut
    cut = reader.look()
    assert cut.state == "stopped"
    assert cut.answered < 3
    journal.write_bytes(data)
    assert reader.look().answered == 3
    reader.close()
    with pytest.raises(JobError, match="is not the output directory of a run: it has no journal"):
        Reader(tmp_path)
    with pytest.raises(JobError, match=r"The directory .* does not exist"):
        Reader(tmp_path / "nothing")
    (tmp_path / "soon").mkdir()
    with Claim(tmp_path / "soon"):
        pass
    with pytest.raises(Interrupted, match="was stopped before it computed anything; type its command again"):
        Reader(tmp_path / "soon")
    with (
        contextlib.closing(Claim(tmp_path / "new")),
        pytest.raises(Interrupted, match="look again in a few seconds"),
    ):
        Reader(tmp_path / "new")


def test_what_differs_between_two_runs(openmpi: Mpi, tmp_path: Path) -> None:
    lines = mixed_lines(12, seed=3)
    source = write_lines(tmp_path / "in.jsonl", lines)
    fewer = write_lines(tmp_path / "fewer.jsonl", lines[:-1])
    one, same, other, less = (tmp_path / name for name in ("one", "same", "other", "less"))
    assert run(openmpi, 1, source, one).returncode == 0
    assert run(openmpi, 2, source, same, "layout.stages=2").returncode == 0
    assert run(openmpi, 1, source, other, "quantize=q8_0").returncode == 0
    assert run(openmpi, 1, fewer, less, "sampling.seed=7").returncode == 0
    done = mpillm("compare", one, same)
    assert (done.returncode, done.stdout) == (0, "equal      12 requests\ndifferent  0 requests\n")
    done = mpillm("compare", one, other)
    assert done.returncode == 1
    assert 'setting    job quantize: "none" and "q8_0"' in done.stdout
    assert "embeddings differ by" in done.stdout
    done = mpillm("compare", one, less)
    assert done.returncode == 1
    assert re.search(
        r"^  r\d+: (choice \d, )?token \d+: \d+ and \d+, ['\"].* and ['\"]", done.stdout, flags=re.M
    )
    assert f"only in the first run: 1 request, such as {lines[-1]['custom_id']}" in done.stdout
