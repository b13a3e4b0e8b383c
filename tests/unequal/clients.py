"""A server on unequal ranks, with clients some of which hang up, while ranks are slow or die."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.chaos.jobs import ADAPTER, TUNED
from tests.chaos.starts import stretched
from tests.cluster.hosts import Hosts
from tests.conftest import Mpi
from tests.unequal.drawing import STEPS, deaths_of
from tests.unequal.starts import LIMIT, Drawn, Fault

CLIENTS = 6
SECONDS = 15.0  # after which a server is told to end if no rank has died
AGREED = ("choices", "data", "results")  # what of a body does not tell when it was answered


class Served(Drawn):
    """A server, and its clients."""

    def __init__(self, mpi: Mpi, folder: Path, seed: str, common: Path, up: Hosts | None) -> None:
        super().__init__(mpi, folder, seed, common, up)
        self.launched = self.draw.random() < 0.5
        self.hosts, self.names = None, self.names[:1]  # clients reach a server on this machine
        self.plan(deaths_of(self.draw, self.ranks, {"step": STEPS["step"], "sum": STEPS["sum"]})[:1])
        self._lines = [json.loads(line) for line in (common / "in.jsonl").read_text().splitlines()]
        answers = map(json.loads, (common / "undisturbed/results.jsonl").read_text().splitlines())
        self._answers = {one["custom_id"]: _agreed(one["response"]["body"]) for one in answers}
        self._over, self.answered = threading.Event(), 0

    def __str__(self) -> str:
        died = [f"{one.rank}:{one.point}:{one.count}:{one.signal}" for one in self.deaths]
        return (
            f"serve{' launched' if self.launched else ''}, {self.ranks} ranks, {' '.join(died) or 'Ctrl-C'}"
        )

    def go(self) -> Counter[str]:
        """Ask until a rank dies, or for SECONDS, and then end the server; raises Fault."""
        words = ["serve", "--model", self.model, "--port", "0", "--data", self.folder / "data"]
        for setting in (f"adapters.{TUNED}={ADAPTER}", *self.settings(served=True)):
            words += ["--set", setting]
        # The server is gone before the clients are waited for.
        with ThreadPoolExecutor(CLIENTS) as pool, self.started([*self.words(), *words]) as launcher:
            try:
                port = self._port(launcher)
                clients = [pool.submit(self._client, port, f"{self.seed} {one}") for one in range(CLIENTS)]
                until = time.monotonic() + SECONDS
                while launcher.poll() is None and (self.died or time.monotonic() < until):
                    time.sleep(0.1)
                    if time.monotonic() > until + stretched(LIMIT):
                        raise Fault(f"hangs: {self.stacks()}")
                if not self.died:  # one in reserve does not compute
                    launcher.send_signal(signal.SIGINT)
                code = self.wait(launcher, 60)
                self._over.set()
                for client in clients:
                    client.result(stretched(60))
            finally:
                self._over.set()
        self.said()
        if code in (2, 70) or ((self.launched or self.died) and (code == 0) != (not self.died)):
            raise Fault(f"exit code {code}")
        if not self.answered and not self.died:
            raise Fault("no answer")
        return Counter({f"serve: exit code {code}": 1, "serve: answers": self.answered})

    def _port(self, launcher: subprocess.Popen[bytes]) -> int:
        until = time.monotonic() + stretched(LIMIT)
        while (found := re.search(r"answers at http://127\.0\.0\.1:(\d+)", self.said())) is None:
            if launcher.poll() is not None:
                raise Fault(f"ended with {launcher.returncode} before it began")
            if time.monotonic() > until:
                raise Fault(f"does not begin: {self.stacks()}")
            time.sleep(0.1)
        return int(found[1])

    def _client(self, port: int, seed: str) -> None:
        """Ask one thing after another until the server is gone."""
        draw = random.Random(seed)
        while not self._over.is_set():
            line = draw.choice(self._lines)
            body, how = dict(line["body"]), draw.random()
            if how < 0.3 and "completions" in line["url"]:
                body |= {"stream": True}
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                contextlib.closing(
                    http.client.HTTPConnection(
                        "127.0.0.1", port, timeout=0.05 if how > 0.8 else stretched(LIMIT)
                    )
                ) as connection,
            ):
                connection.request(
                    "POST", line["url"], json.dumps(body), {"Content-Type": "application/json"}
                )
                answer = connection.getresponse()
                if body.get("stream"):
                    answer.read(draw.choice((1, 200, 10**6)))
                    continue
                found = json.loads(answer.read())
                if answer.status == 200:
                    self.answered += 1
                    drawn = body.get("temperature")  # by a seed of each request
                    if not drawn and _agreed(found) != self._answers[line["custom_id"]]:
                        raise Fault(f"another answer to {line['custom_id']}: {found}")
                elif answer.status != 503:
                    raise Fault(f"{answer.status} for {line['custom_id']}: {found}")
            time.sleep(0.02)


def _agreed(body: dict[str, Any]) -> dict[str, Any]:
    return {key: body[key] for key in AGREED if key in body}
