"""`Job`: a run from Python, as `mpillm launch` does it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpillm import spec
from mpillm.api.plain import json_of, ranks_of
from mpillm.api.results import Results
from mpillm.errors import Interrupted, JobError, MpillmError
from mpillm.launching.mpiexec import CALLER


class Job:
    """A job file, keys of a job, or both: a file of requests becomes a directory of answers.

    >>> job = Job("jobs/quickstart.toml", output="out/mine", sampling={"temperature": 0.8})
    >>> results = job.run(ranks=4)
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, **keys: Any) -> None:
        """`keys` override the file: `model`, `input`, `output`, `quantize`, or tables such as `memory={"kv": "1GiB"}`.

        Raises JobError if the job is wrong.
        """
        if "ranks" in keys:
            raise JobError(f"The number of ranks is given to run: Job(...).run(ranks={keys['ranks']}).")
        self._words = [] if path is None else [os.fspath(path)]
        names: dict[str, Any] = {
            name: _path(name, keys.pop(name)) for name in ("model", "input", "output") if name in keys
        }
        self._words += [word for name, value in names.items() for word in (f"--{name}", value)]
        settings = list(_settings(keys))
        self._words += [word for setting in settings for word in ("--set", setting)]
        #: the checked job
        self.spec = spec.load(path, settings, **names, caller="Job")

    @property
    def directory(self) -> Path:
        """The directory of the results."""
        return self.spec.output_path

    def run(self, ranks: int = 1) -> Results:
        """Run the job on `ranks` ranks of this machine, or continue it; return the results.

        The results include requests with an error. Ranks that fail are started again. Raises MpillmError if the job
        cannot run, and Interrupted (or KeyboardInterrupt after Ctrl-C) if it stopped; the same call continues it. If
        this process ends in any way, the run stops too.
        """
        words = [sys.executable, "-m", "mpillm", "launch", "-n", str(ranks_of(ranks)), "run", *self._words]
        # A session of its own: Ctrl-C is passed on once, and then waited for.
        with subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True, env={**os.environ, CALLER: str(os.getpid())},
        ) as process:  # fmt: skip
            try:
                _, said = process.communicate()
            except BaseException:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(KeyboardInterrupt):
                    process.communicate()
                raise
        if process.returncode in (0, 1):
            return Results(self.directory)
        ours = [line.removeprefix("mpillm: ") for line in said.splitlines() if line.startswith("mpillm: ")]
        reason = ours[-1] if ours else f"The run ended with exit code {process.returncode}: {said[-500:]}"
        kinds: dict[int, type[MpillmError]] = {2: JobError, 75: Interrupted}
        raise kinds.get(process.returncode, MpillmError)(reason)

    def __repr__(self) -> str:
        return f"<Job {' or '.join(self.spec.model_names)}: {self.spec.input} to {self.spec.output.path}>"


def _path(name: str, given: Any) -> str:
    if isinstance(given, str | os.PathLike):
        return str(os.fspath(given))
    asked = " (requests in a list are for LLM(...).stream)" if name == "input" else ""
    raise JobError(f"Job: {name}: expected a path{asked}, not {given!r:.60}.")


def _settings(keys: Mapping[str, Any]) -> Iterator[str]:
    """Keys and tables as `--set` takes them; what is None is not set."""
    for name, value in keys.items():
        inner = value if isinstance(value, Mapping) else {None: value}
        for key, one in inner.items():
            if one is not None:
                yield f"{name if key is None else f'{name}.{_quoted(key)}'}={json_of(one)}"


def _quoted(key: str) -> str:
    """Return a key as TOML quotes it, without a "=", which ends a name."""
    return json.dumps(key, ensure_ascii=False).replace("=", "\\u003d")
