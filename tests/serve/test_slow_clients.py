"""Clients that send half a request, or read half an answer: they cost nobody else anything."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from mpillm.serve.connections import Connection, Quiet
from tests.conftest import HANGS, clean_environment
from tests.job_helpers import CHAT

BODY = json.dumps({"prompt": "the", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\n"
SENT = [
    HEAD,
    HEAD + b"Content-Length: 100\r\n\r\n" + BODY[:9],
    HEAD + b"Content-Length: 400000\r\n\r\n" + b" " * 200_000,
    HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    b"nonsense\r\n\r\n",
]


def slow_clients(netloc: str, count: int) -> list[socket.socket]:
    host, _, port = netloc.partition(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(count)]
    for index, client in enumerate(clients):
        client.sendall(SENT[index % len(SENT)])
    return clients


def test_200_slow_clients_and_a_log_that_nobody_reads(tmp_path: Path) -> None:
    """The server wrote a traceback for each, and stopped when the pipe was full."""
    words = ["serve", "--model", str(CHAT), "--port", "0", "--data", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "mpillm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean_environment(),
    ) as process:
        try:
            assert process.stdout is not None
            while b"answers at " not in (line := process.stdout.readline()):
                assert line, "the server has ended"
            url = line.decode().partition("answers at ")[2].partition(" ")[0]
            with openai.OpenAI(
                base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=HANGS / 2
            ) as client:
                for stays in (False, False, True):
                    clients = slow_clients(urlsplit(url).netloc, 200)
                    if not stays:
                        for one in clients:
                            one.close()
                    answer = client.completions.create(model="chat", prompt="the fox", max_tokens=4)
                    assert answer.usage is not None
                    assert answer.usage.completion_tokens == 4
            process.send_signal(signal.SIGTERM)  # while 200 have sent half a request
            assert process.wait(HANGS) == 0
            said = process.stdout.read().decode()
            assert "Traceback" not in said
            assert "The server has ended." in said
            for one in clients:
                one.close()
        finally:
            process.kill()


def test_a_connection_that_is_silent_amid_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes is not; nor does what has come in time count."""
    monkeypatch.setattr(Connection, "PATIENCE", 0.2)
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        seen.append(message["type"])
        if message["type"] == "http.request":
            await asyncio.sleep(0.6)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

    async def talk() -> tuple[list[bytes], bytes]:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(Quiet(app), http=Connection, log_level="error", lifespan="off")
        )
        task = asyncio.create_task(server.serve([listener]))
        address = listener.getsockname()[:2]
        silent = []
        for text in (b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\nab"):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(text)
            silent.append(await reader.read())
            writer.close()
        reader, writer = await asyncio.open_connection(*address)
        for piece in (HEAD, b"Content-Length: 2\r\n\r\n", b"a", b"b"):
            writer.write(piece)
            await asyncio.sleep(0.05)
        answer = (await reader.readuntil(b"ok"))[:15]
        writer.close()
        server.should_exit = True
        await task
        return silent, answer

    assert asyncio.run(talk()) == ([b"", b"", b""], b"HTTP/1.1 200 OK")
    assert seen == ["http.disconnect", "http.request"]
