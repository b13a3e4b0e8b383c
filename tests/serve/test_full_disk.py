"""A server whose disk is full: nothing is left half written, and batches end when there is space."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import Mount, clean_environment, run_bounded
from tests.job_helpers import CHAT
from tests.serve.serving import serving
from tests.serve.test_batches import BODIES, LINES, ended, lines_of
from tests.serve.test_server import batch as answers_of_a_run

FULL = "The server's disk is full; the batch goes on when there is space."
SOURCE = "".join(f"{json.dumps(line)}\n" for line in LINES).encode()


def fill(disk: Path, free: int) -> Path:
    """A file that leaves `free` bytes of a disk."""
    ballast = disk / "ballast"
    state = os.statvfs(disk)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, state.f_bavail * state.f_frsize - free))
    return ballast


def waiting(client: openai.OpenAI, name: str) -> Any:
    """The batch, when it says that it waits for space."""
    while (found := client.batches.retrieve(name)).errors is None:
        time.sleep(0.05)
    assert found.errors.data[0].message == FULL
    return found


def test_batches_and_uploads_on_a_full_disk(mounted: Mount, tmp_path: Path) -> None:
    disk = mounted("size=4m")
    expected = [body["choices"] for body in answers_of_a_run(tmp_path, BODIES)]
    with (
        serving(tmp_path, [sys.executable], clean_environment(), "--data", str(disk / "data")) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):

        def begin() -> str:
            return client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            ).id

        def answers(name: str) -> list[Any]:
            state = ended(client, name)
            assert (state.status, state.errors) == ("completed", None)
            return [line["response"]["body"]["choices"] for line in lines_of(client, state.output_file_id)]

        file = client.files.create(file=("in.jsonl", SOURCE), purpose="batch")
        first = begin()
        assert answers(first) == expected
        journal = (disk / "data/batches" / first / "journal").stat().st_size
        there = sorted(os.listdir(disk / "data/files"))

        # Its journal has space, its results do not.
        ballast = fill(disk, journal * 3 // 2)
        second = begin()
        assert waiting(client, second).status == "finalizing"
        alone = client.completions.create(model="chat", prompt="a", max_tokens=2)
        assert alone.usage.completion_tokens == 2
        with pytest.raises(openai.InternalServerError, match="disk is full, so nothing was stored") as found:
            client.files.create(file=("in.jsonl", SOURCE * 500), purpose="batch")
        assert found.value.status_code == 507
        ballast.unlink()
        assert answers(second) == expected

        # Its journal has none.
        third = begin()
        while client.batches.retrieve(third).request_counts.completed < 2:
            time.sleep(0.02)
        ballast = fill(disk, 0)
        assert waiting(client, third).status == "in_progress"
        with pytest.raises(openai.InternalServerError, match="disk is full") as found:
            begin()
        assert client.completions.create(model="chat", prompt="a", max_tokens=2).choices
        ballast.unlink()
        assert answers(third) == expected
        results = {client.batches.retrieve(name).output_file_id for name in (second, third)}
        names = {*there, *results, *(f"{name}.json" for name in results)}
        assert set(os.listdir(disk / "data/files")) == names
    log = (tmp_path / "log").read_text()
    assert log.count("There is no space left for") == 2, log
    assert "Traceback" not in log


def test_data_that_cannot_be_written(mounted: Mount, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mpillm", "serve", "--model", CHAT, "--port", "0", "--data"]
    done = run_bounded([*words, mounted("ro") / "data"], env=clean_environment())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "data cannot be written: Read-only file system" in done.stderr
    (tmp_path / "file").touch()
    done = run_bounded([*words, tmp_path / "file"], env=clean_environment())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
