"""A server in a memory cgroup of what `plan` says, a tenth, and what the page says that requests take."""

from __future__ import annotations

import http.client
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mpillm import spec
from mpillm.planning import plan
from mpillm.planning.input_memory import PROMPT
from mpillm.serve.arrivals import WAITING_TOKENS
from mpillm.serve.state import CHECKED
from tests.conftest import clean_environment
from tests.e2e.jobs import CHAT
from tests.run.cgroups import SPARE, Cgroup
from tests.serve.serving import serving

SETTINGS = ["layout.threads=1", "memory.kv=8MiB"]
REQUESTS = CHECKED + PROMPT * WAITING_TOKENS  # bytes that the server takes for them at most

Body = dict[str, Any]
CHATS: Body = {"messages": [{"role": "user", "content": "the quick brown " * 20}], "max_tokens": 4}
# What a client may send that takes much memory, and the answer's status.
LARGE: dict[str, tuple[Callable[[], Body], int]] = {
    "a long text": (lambda: {"prompt": "a" * 8_000_000}, 400),
    "wide characters": (lambda: {"prompt": "\N{GRINNING FACE}a" * 4_000_000}, 413),
    "many tokens": (lambda: {"prompt": [5] * 4_000_000}, 413),
    "many lists": (lambda: {"prompt": "a", "max_tokens": 1, "metadata": [[]] * 5_000_000}, 413),
    "many prompts": (lambda: {"prompt": ["a " * 100] * 500, "max_tokens": 1}, 200),
}


@pytest.mark.slow
def test_requests_take_no_more_than_is_said(cgroup: Cgroup, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.jsonl"
    nothing.touch()
    job = spec.load(None, SETTINGS, model=str(CHAT), input=str(nothing), output=str(tmp_path / "out"))
    (planned,) = plan.make(job, 1).ranks
    cgroup.limit(int(SPARE * planned.held) + REQUESTS)
    command: list[str | Path] = [
        "sh",
        "-c",
        f'echo $$ > {cgroup.path}/cgroup.procs && exec "$@"',
        "sh",
        sys.executable,
    ]
    env = clean_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    words = [f"--set={one}" for one in SETTINGS]
    with serving(tmp_path, command, env, *words, model=CHAT) as (url, process):
        assert ask_together(url, "/v1/chat/completions", CHATS, 48) == {200: 48}
        assert peak(process.pid) <= planned.held
        for name, (body, status) in LARGE.items():
            assert ask_together(url, "/v1/completions", body(), 8) == {status: 8}, name
        assert ask_together(url, "/v1/chat/completions", CHATS, 1) == {200: 1}
        taken = peak(process.pid)
    assert taken <= planned.held + REQUESTS
    assert (cgroup.kills(), cgroup.swapped()) == (0, 0)
    print(f"server: {taken / 2**20:.1f} of {(planned.held + REQUESTS) / 2**20:.1f} MiB")


def ask_together(url: str, path: str, body: Body, count: int) -> Counter[int]:
    """The statuses of the same request that so many clients send at once."""
    sent = json.dumps(body, ensure_ascii=False).encode()

    def ask(_: int) -> int:
        client = http.client.HTTPConnection(urlsplit(url).netloc)
        client.request("POST", path, sent, {"Content-Type": "application/json"})
        answer = client.getresponse()
        answer.read()
        client.close()
        return answer.status

    with ThreadPoolExecutor(count) as clients:
        return Counter(clients.map(ask, range(count)))


def peak(pid: int) -> int:
    """The most bytes that a process has had in memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024
