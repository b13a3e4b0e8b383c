"""Clients upload files, make batches, cancel some and stream, while the server is killed again and again."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.conftest import HANGS, Mpi, clean_environment
from tests.serve.serving import journaled_once, serving
from tests.serve.test_batches import ended, lines_of
from tests.serve.test_lost_ranks import process_of
from tests.serve.test_server import batch as answers_of_a_run

CLIENTS, LINES = 4, 10
BODIES: list[list[dict[str, Any]]] = [
    [{"prompt": f"the fox {client} {n}", "max_tokens": 10 + 10 * n, "ignore_eos": True} for n in range(LINES)]
    for client in range(CLIENTS)
]
STREAMED = {"prompt": "the lazy dog", "max_tokens": 80, "ignore_eos": True}
AGAIN = (openai.APIConnectionError, openai.InternalServerError)  # the server is away, or about to end


@dataclass
class Clients:
    """What clients of a server that is killed at times have been told."""

    url: str
    over: threading.Event = field(default_factory=threading.Event)
    answered: int = 0  # lines
    files: dict[str, bytes] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    streams: list[str] = field(default_factory=list)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=HANGS)

    def until_told(self, ask: Callable[[], Any]) -> Any:
        """The answer to a question that is asked again while the server is away."""
        while True:
            try:
                return ask()
            except AGAIN:
                assert not self.over.is_set(), "the server did not come back"
                time.sleep(0.05)

    def batch(self, number: int) -> str:
        """Upload a file, make a batch of it, at times cancel it, and wait for its end."""
        source = "".join(
            f"{json.dumps({'custom_id': f'{number}-{n}', 'method': 'POST', 'url': '/v1/completions', 'body': body})}\n"
            for n, body in enumerate(BODIES[number])
        ).encode()
        mine = {"client": str(number)}
        with self.client() as client:

            def make() -> str:
                for (
                    each
                ) in client.batches.list():  # a batch may be there although the server died before it said so
                    if each.metadata == mine:
                        return each.id
                return client.batches.create(
                    input_file_id=file, endpoint="/v1/completions", completion_window="24h", metadata=mine
                ).id

            file = self.until_told(lambda: client.files.create(file=("in.jsonl", source), purpose="batch")).id
            self.files[file] = source
            name: str = self.until_told(make)
            seen = 0
            while True:
                state = self.until_told(lambda: client.batches.retrieve(name))
                assert state.request_counts.completed >= seen, (
                    "less after a kill, which takes nothing from the disk"
                )
                self.answered += state.request_counts.completed - seen
                seen = state.request_counts.completed
                if number == 1 and seen >= 2 and name not in self.cancelled:
                    assert self.until_told(lambda: client.batches.cancel(name)).status != "completed"
                    self.cancelled.add(name)
                if state.status in ("completed", "failed", "cancelled"):
                    return name
                time.sleep(0.02)

    def stream(self) -> None:
        """Stream the same answer until all is over."""
        more = {"ignore_eos": True}
        asked = {key: value for key, value in STREAMED.items() if key not in more}
        with self.client() as client:
            while not self.over.is_set():
                try:
                    with client.completions.create(
                        model="chat", stream=True, extra_body=more, **asked
                    ) as stream:
                        chunks = [chunk.choices[0] for chunk in stream]
                except openai.APIError:  # cut off by a kill
                    time.sleep(0.05)
                    continue
                assert chunks[-1].finish_reason == "length"
                self.streams.append("".join(chunk.text for chunk in chunks))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def killed_beside_clients(
    folder: Path, command: list[str | Path], env: dict[str, str], victims: tuple[int | None, ...]
) -> None:
    """Kill a rank, or the process that was started (None), when some more lines are answered, and start again."""
    *expected, streamed = answers_of_a_run(folder, [*itertools.chain(*BODIES), STREAMED])
    texts = [answer["choices"] for answer in expected]
    notes, port = folder / "notes", free_port()
    notes.touch()
    env = {**env, "NOTES": str(notes)}
    more = ("--port", str(port))
    clients = Clients(f"http://127.0.0.1:{port}")
    with ThreadPoolExecutor(CLIENTS + 2) as pool:
        try:
            batches = [pool.submit(clients.batch, number) for number in range(CLIENTS)]
            streams = [pool.submit(clients.stream) for _ in range(2)]
            for kill, victim in enumerate(victims):
                with serving(folder, command, env, *more, program="tests.serve.program") as (_, process):
                    first = psutil.Process(process.pid)
                    processes = [first, *first.children(recursive=True)]
                    doomed = process.pid if victim is None else process_of(process.pid, victim)
                    enough = clients.answered + (3 if kill else 0)  # the first while files are uploaded
                    while clients.answered < enough or not clients.files:
                        assert not any(each.done() for each in streams)
                        time.sleep(0.01)
                    os.kill(doomed, signal.SIGKILL)
                    assert process.wait(HANGS) != 0
                    assert not psutil.wait_procs(processes[1:], HANGS)[1]
            with serving(folder, command, env, *more, program="tests.serve.program"):
                made = [each.result(HANGS) for each in batches]
                shown = len(clients.streams)
                while len(clients.streams) < shown + 2:
                    assert not any(each.done() for each in streams)
                    time.sleep(0.05)
                clients.over.set()
                for each in streams:
                    each.result(HANGS)
        finally:
            clients.over.set()
    assert set(clients.streams) == {streamed["choices"][0]["text"]}
    with (
        serving(folder, command, env, *more, program="tests.serve.program"),
        clients.client() as client,
    ):
        for number, name in enumerate(made):
            state = ended(client, name)
            assert state.status == ("cancelled" if name in clients.cancelled else "completed")
            answers = lines_of(client, state.output_file_id)
            numbers = [int(answer["custom_id"].removeprefix(f"{number}-")) for answer in answers]
            if name not in clients.cancelled:
                assert numbers == list(range(LINES))
            assert numbers == sorted(set(numbers))
            mine = texts[LINES * number : LINES * (number + 1)]
            assert [answer["response"]["body"]["choices"] for answer in answers] == [mine[n] for n in numbers]
        assert len(clients.cancelled) == 1
        for file, source in clients.files.items():
            assert client.files.content(file).content == source
        assert len(client.batches.list().data) == CLIENTS
    journaled_once(notes)


def test_on_one_rank(tmp_path: Path) -> None:
    killed_beside_clients(tmp_path, [sys.executable], clean_environment(), (None,) * 3)


@pytest.mark.mpiexec
def test_on_two_ranks(mpich: Mpi, tmp_path: Path) -> None:
    """With Open MPI, test_killed_batches.py and test_lost_ranks.py kill ranks of servers."""
    killed_beside_clients(tmp_path, mpich.command(2), mpich.environment(), (1, 0, None))
