"""A server on several ranks, of which some are killed or hang, and mpiexec at last."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.conftest import HANGS, Mpi
from tests.serve.serving import journaled_once, serving
from tests.serve.test_batches import ended, lines_of
from tests.serve.test_server import batch as answers_of_a_run

BODIES: list[dict[str, Any]] = [
    {"prompt": f"the fox {n}", "max_tokens": 12 * n, "ignore_eos": True} for n in range(1, 25)
]
# Two stages of two shards, whose weights are read again in every step.
LAYOUT = ("--set", "layout.stages=2", "--set", "layout.shards=2", "--set", "memory.weights=20KiB")


def process_of(mpiexec: int, rank: int) -> int:
    """The process of a rank."""
    for process in psutil.Process(mpiexec).children(recursive=True):
        env = process.environ()
        if env.get("OMPI_COMM_WORLD_RANK", env.get("PMI_RANK")) == str(rank):
            return process.pid
    raise AssertionError(f"there is no rank {rank}")


def ask_until_the_end(url: str) -> str:
    """Stream answers until the server has gone; the class and the words of what was said then."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANGS) as client:
        while True:
            try:
                with client.completions.create(
                    model="chat", prompt="the", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
                ) as stream:
                    reasons = [chunk.choices[0].finish_reason for chunk in stream]
                assert reasons[-1] == "length", "an answer that was cut is no answer"
            except openai.APIError as error:
                return f"{type(error).__name__}: {error}"


@pytest.mark.mpiexec
def test_a_server_on_four_ranks_is_killed_and_goes_on(mpi: Mpi, tmp_path: Path) -> None:
    """Clients get an error, no process is left, and batches end with the results of a run, nothing computed twice."""
    expected = [body["choices"] for body in answers_of_a_run(tmp_path, BODIES)]
    notes = tmp_path / "notes"
    env = mpi.environment(NOTES=str(notes))
    made: list[str] = []
    for victim in (3, 0, None):
        with (
            serving(tmp_path, mpi.command(4), env, *LAYOUT, program="tests.serve.program") as (url, process),
            ThreadPoolExecutor(4) as pool,
        ):
            ranks = [psutil.Process(process_of(process.pid, rank)) for rank in range(4)]
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
                for name in "ab" if not made else ():
                    lines = [
                        {"custom_id": f"{name}{n}", "method": "POST", "url": "/v1/completions", "body": body}
                        for n, body in enumerate(BODIES)
                    ]
                    source = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
                    file = client.files.create(file=("in.jsonl", source), purpose="batch")
                    made.append(
                        client.batches.create(
                            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
                        ).id
                    )
                before = client.batches.retrieve(made[0]).request_counts.completed
                clients = [pool.submit(ask_until_the_end, url) for _ in range(4)]
                while client.batches.retrieve(made[0]).request_counts.completed < before + 2:
                    time.sleep(0.02)
            os.kill(process.pid if victim is None else ranks[victim].pid, signal.SIGKILL)
            # Rank 0 says it, if mpiexec leaves it the time.
            assert {client.result(HANGS) for client in clients} <= {
                "APIError: The server stopped before the answer was complete.",
                "APIConnectionError: Connection error.",
            }
            assert process.wait(HANGS) != 0
            assert not psutil.wait_procs(ranks, HANGS)[1]
    with (
        serving(tmp_path, mpi.command(4), env, *LAYOUT, program="tests.serve.program") as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        for name in made:
            state = ended(client, name)
            assert state.status == "completed"
            answers = lines_of(client, state.output_file_id)
            assert [answer["response"]["body"]["choices"] for answer in answers] == expected
    journaled_once(notes)


@pytest.mark.mpiexec
@pytest.mark.parametrize("mpi", ["openmpi"], indirect=True)
def test_a_server_ends_if_a_rank_hangs_in_a_step(mpi: Mpi, tmp_path: Path) -> None:
    """Between requests all ranks may do nothing for longer than the deadline."""
    env = mpi.environment(NOTES=str(tmp_path / "notes"), HANGING="1", MPILLM_DEADLINE="2")
    stages = ("--set", "layout.stages=2")
    with serving(tmp_path, mpi.command(2), env, *stages, program="tests.serve.program") as (url, process):
        time.sleep(5)
        assert ask_until_the_end(url).startswith("API")
        assert process.wait(HANGS) != 0
    assert "hangs" in (tmp_path / "log").read_text()
