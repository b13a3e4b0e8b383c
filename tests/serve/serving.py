"""A server in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import HANGS
from tests.job_helpers import CHAT


@contextmanager
def serving(
    folder: Path,
    command: list[str | Path],
    env: dict[str, str],
    *more: str,
    model: str | Path = CHAT,
    program: str = "mpillm",
) -> Iterator[tuple[str, Any]]:
    """A server that has begun to listen: its URL and its process."""
    words = [
        *command,
        "-m",
        program,
        "serve",
        "--model",
        model,
        "--port",
        "0",
        "--data",
        folder / "data",
        *more,
    ]
    log = folder / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env
        )
    try:
        while "answers at http://" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield log.read_text().partition("answers at ")[2].partition(" ")[0], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(HANGS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def journaled_once(notes: Path) -> set[str]:
    """The lines of batches that `program` noted as journaled; AssertionError if one was computed again later."""
    journaled: set[str] = set()
    for line in notes.read_text().splitlines():
        what, _, name = line.partition(" ")
        if what == "journaled":
            journaled.add(name)
        else:
            assert name not in journaled, "computed again"
    return journaled
