"""Another program's own bench as a peer: `llama-batched-bench`, which llama.cpp and ik_llama.cpp both have."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mpillm.bench.against import Prompts
from mpillm.errors import JobError

# The program on some cores: `python -c PINNED CORES PROGRAM ARGUMENTS...`.
PINNED = (
    "import os, sys; "
    "hasattr(os, 'sched_setaffinity') and os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)
TURNS = 2  # turns of one process; only the last one counts, because the first one fills the page cache
CONTEXT = 256  # the context's size is a multiple of it
ATTEMPTS = 5  # of a run whose table is cut: llama.cpp's rows are written in a thread, and its end does not wait for it


class BatchedBench:
    """A `Peer`: the program at `binary`, called `name`; each run is a process with `threads` threads on `cores`."""

    def __init__(self, name: str, binary: Path, model: Path, threads: int, cores: Sequence[int]) -> None:
        """Raises JobError if there is no such program."""
        if not (binary.is_file() and os.access(binary, os.X_OK)):
            raise JobError(
                f"--against {name}={binary}: this is not a program; give the path of llama-batched-bench."
            )
        self._name, self._binary, self._model = name, binary.resolve(), model.resolve()
        self._threads, self._cores = threads, cores

    def run(self, prompts: Prompts, tokens: int) -> list[float]:
        """`Peer.run`, of prompts of as many tokens: the program takes its own. Steps last equally long."""
        count, length, steps = len(prompts), len(prompts[0]), max(tokens - 1, 1)
        context = -(-count * (length + steps) // CONTEXT) * CONTEXT
        sizes = {"-t": self._threads, "-c": context, "-b": context, "-npp": length, "-ntg": steps}
        command = [sys.executable, "-c", PINNED, ",".join(map(str, self._cores)), str(self._binary)]
        command += ["-m", str(self._model), "-npl", ",".join([str(count)] * TURNS)]
        command += [word for option, value in sizes.items() for word in (option, str(value))]
        # Settings of our OpenMP must not slow down the other program.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        for _ in range(ATTEMPTS):
            with tempfile.TemporaryDirectory() as folder:  # it leaves a log where it runs
                done = subprocess.run(
                    command,
                    check=False,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    env=environment,
                    cwd=folder,
                )
            if done.returncode:
                said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
                raise JobError(f"{self._name} failed with exit code {done.returncode}: {said}")
            rows = _rows(done.stdout) or _rows(done.stderr)  # versions differ in where they print it
            if len(rows) == TURNS:
                return [rows[-1]["T_PP s"]] + [rows[-1]["T_TG s"] / steps] * (tokens - 1)
        raise JobError(
            f"{self._name} ended {ATTEMPTS} times before it had printed its {TURNS} measurements; "
            "measure on a machine that does nothing else, and give the path of llama-batched-bench."
        )

    def start(self, prompt: Sequence[int]) -> float:
        raise JobError(f"{self._name} does not report the time of a start; leave startup out of --what.")

    def close(self) -> None:
        """Do nothing: no process runs between two measurements."""


def _rows(text: str) -> list[dict[str, float]]:
    """Return the numbers of the program's table, by the heads of its columns."""
    table = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    if not table:
        return []
    heads = [head.strip() for head in table[0]]
    whole = [row for row in table[1:] if len(row) == len(heads) and not row[0].startswith("-")]
    return [dict(zip(heads, map(float, row), strict=True)) for row in whole]
