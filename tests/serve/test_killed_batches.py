"""A batch of the server that is killed again and again near its end: the results of a run, nothing computed twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from tests.conftest import HANGS, Mpi, clean_environment
from tests.job_helpers import CHAT
from tests.serve.serving import journaled_once, serving
from tests.serve.test_batches import BODIES, LINES, WRONG, ended, lines_of
from tests.serve.test_server import batch as answers_of_a_run

# Of the lines, of their journal, of the status, of the files of results and of their descriptions.
KILLS = (
    "append after 34",
    "append before 2",
    "flush after 2",
    "status before 2",
    "status after 2",
    "wrong line before 1",
    "write after 1",
    "description before 3",
    "file after 1",
    "file after 2",
    "status before 3",
    "status after 3",
)

PROGRAM = "tests.serve.program"


def start_and_die(folder: Path, command: list[str | Path], env: dict[str, str]) -> None:
    """Start a server that ends itself with SIGKILL."""
    words = ["serve", "--model", CHAT, "--port", "0", "--data", folder / "data"]
    with open(folder / "log", "wb") as log:
        done = subprocess.run(
            [str(word) for word in (*command, "-m", PROGRAM, *words)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=HANGS,
            check=False,
        )
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL, signal.SIGKILL), env["KILLED"]


def killed_again_and_again(
    folder: Path, command: list[str | Path], env: dict[str, str], kills: tuple[str, ...]
) -> None:
    expected = answers_of_a_run(folder, BODIES)
    source = "".join(f"{json.dumps(line)}\n" for line in [*LINES, WRONG]).encode()
    notes = folder / "notes"
    env = {**env, "NOTES": str(notes)}
    with (
        serving(folder, command, {**env, "KILLED": kills[0]}, program=PROGRAM) as (url, process),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        file = client.files.create(file=("in.jsonl", source), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        assert process.wait(HANGS) != 0
    for kill in kills[1:]:
        start_and_die(folder, command, {**env, "KILLED": kill})
    with (
        serving(folder, command, env, program=PROGRAM) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        state = ended(client, made.id)
        assert state.status == "completed"
        assert state.request_counts.model_dump() == {"completed": 40, "failed": 1, "total": 41}
        assert state.created_at <= state.in_progress_at <= state.finalizing_at <= state.completed_at
        answers = lines_of(client, state.output_file_id)
        assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in LINES]
        texts = [answer["response"]["body"]["choices"] for answer in answers]
        assert texts == [body["choices"] for body in expected]
        assert [error["custom_id"] for error in lines_of(client, state.error_file_id)] == ["wrong"]
        # No results are there twice, and nothing else is left.
        there = {file.id, state.output_file_id, state.error_file_id}
        assert {found.id for found in client.files.list()} == there
        names = {path.name for path in (folder / "data/files").iterdir()}
        assert names == {*there, *(f"{name}.json" for name in there)}
    assert journaled_once(notes) == {line["custom_id"] for line in LINES}


def test_killed_near_the_end(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, [sys.executable], clean_environment(), KILLS)


@pytest.mark.mpiexec
def test_killed_near_the_end_on_two_ranks(openmpi: Mpi, tmp_path: Path) -> None:
    """With MPICH, test_killed_beside_clients.py and test_lost_ranks.py kill ranks of servers."""
    kills = (KILLS[0], *KILLS[5:10:2])
    killed_again_and_again(tmp_path, openmpi.command(2), openmpi.environment(), kills)


def test_what_was_cancelled_stays_cancelled(tmp_path: Path) -> None:
    """Killed as soon as it was asked to cancel, and before and after it has noted the end of the batch."""
    env = clean_environment(NOTES=str(tmp_path / "notes"))
    source = "".join(f"{json.dumps(line)}\n" for line in LINES).encode()
    with (
        serving(tmp_path, [sys.executable], {**env, "KILLED": "status after 2"}, program=PROGRAM) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        file = client.files.create(file=("in.jsonl", source), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        while client.batches.retrieve(made.id).status != "in_progress":
            time.sleep(0.01)
        with pytest.raises(openai.APIConnectionError):
            client.batches.cancel(made.id)
    for kill in ("status before 1", "status after 1"):
        start_and_die(tmp_path, [sys.executable], {**env, "KILLED": kill})
    with (
        serving(tmp_path, [sys.executable], env, program=PROGRAM) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        state = ended(client, made.id)
        assert (state.status, state.request_counts.total) == ("cancelled", 40)
        assert state.request_counts.completed < 40
        assert [each.id for each in client.files.list(purpose="batch")] == [file.id]


def test_another_server_with_the_same_directory(tmp_path: Path) -> None:
    """It would say that the batches of the first have failed."""
    words = ["serve", "--model", CHAT, "--port", "0", "--data", tmp_path / "data"]
    with serving(tmp_path, [sys.executable], clean_environment()):
        other = subprocess.run(
            [str(word) for word in (sys.executable, "-m", "mpillm", *words)],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )
    assert other.returncode == 2
    assert f"Another server uses {tmp_path / 'data'}; stop it, or give another --data." in other.stderr
