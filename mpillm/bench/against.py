"""llama.cpp as a peer: a child process that runs the same file, alternately with this program."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Protocol

from mpillm.errors import JobError

Prompts = Sequence[Sequence[int]]


class Peer(Protocol):
    """Another program that runs the same model."""

    def run(self, prompts: Prompts, tokens: int) -> list[float]:
        """Return seconds of all prompts together, then of each of `tokens` - 1 steps of all sequences."""

    def start(self, prompt: Sequence[int]) -> float:
        """Return seconds from opening the model to the first token."""

    def close(self) -> None:
        """End it."""


def installed() -> bool:
    """Return whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """A `Peer`: llama.cpp with `threads` threads, on the cores `cores`."""

    def __init__(self, model: Path, threads: int, cores: Sequence[int]) -> None:
        """Load the model; JobError if llama-cpp-python is missing or cannot load it."""
        if not installed():
            raise JobError("--against llama.cpp needs llama-cpp-python: pip install 'mpillm[bench]'.")
        # Settings of our OpenMP must not slow down the other program.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "mpillm.bench.llama_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self._ask({"path": str(model), "threads": threads, "cores": list(cores)})
        except JobError:
            self.close()
            raise

    def run(self, prompts: Prompts, tokens: int) -> list[float]:
        return self._ask({"prompts": [list(prompt) for prompt in prompts], "tokens": tokens})

    def start(self, prompt: Sequence[int]) -> float:
        return self._ask({"start": list(prompt)})[0]

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
            self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, command: dict[str, Any]) -> list[float]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            print(json.dumps(command), file=self._child.stdin, flush=True)
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"it ended with exit code {self._child.wait()}"}
        if isinstance(answer, dict):
            raise JobError(f"llama.cpp failed: {answer['error']}.")
        return [float(seconds) for seconds in answer]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median ratio of neighbouring runs, because a machine that is slow for a while slows both of a pair."""
    return median(own / other for own, other in zip(ours, theirs, strict=True))
