"""What an `LLM` leaves behind when its program is interrupted or killed: nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from mpillm.api import remote
from mpillm.store.status import Reader
from tests.conftest import HANGS, clean_environment
from tests.e2e.jobs import CHAT, write_lines

pytestmark = pytest.mark.mpiexec


def below(parent: int) -> list[psutil.Process]:
    """The ranks that a process has started."""
    return [one for one in psutil.Process(parent).children(recursive=True) if "ranks" in one.cmdline()]


def shared_by(ranks: list[psutil.Process]) -> set[Path]:
    """The files in /dev/shm that processes have mapped."""
    found = set()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {mapped.path for mapped in rank.memory_maps()}
    return {Path(path) for path in found if path.startswith("/dev/shm")}


CALLER = """
import sys
from mpillm import LLM

print("starting", flush=True)
llm = LLM(sys.argv[1], ranks=int(sys.argv[2]), memory={"kv": "64MiB"})
print("ready", flush=True)
try:
    llm.generate([f"the quick {n}" for n in range(500)], max_tokens=400, ignore_eos=True)
except KeyboardInterrupt:
    print(len(llm.generate("the quick", max_tokens=3)[0].completions), flush=True)
"""


@pytest.mark.parametrize(
    ("number", "when", "ranks", "says"),
    [
        (signal.SIGINT, "starting", 2, "ready\n1\n"),
        (signal.SIGINT, "ready", 2, "1\n"),
        (signal.SIGINT, "ready", 1, "1\n"),
        (signal.SIGKILL, "ready", 2, ""),
    ],
)
def test_nothing_is_left_behind(number: signal.Signals, when: str, ranks: int, says: str) -> None:
    """Neither a process nor shared memory nor a file, after Ctrl-C during the start, too."""
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        subprocess.Popen(
            [sys.executable, "-c", CALLER, CHAT, str(ranks)],
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(TMPDIR=folder),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        ) as caller,
    ):
        assert caller.stdout is not None
        while caller.stdout.readline() != f"{when}\n":
            pass
        while len(started := below(caller.pid)) < ranks:
            time.sleep(0.01)
        time.sleep(0.5 if when == "ready" else 0.3)
        shared = shared_by(started)
        caller.send_signal(number)
        said = caller.stdout.read()
        gone, alive = psutil.wait_procs(started, timeout=HANGS)
        assert not alive
        assert len(gone) == len(started)
        caller.wait()
        assert said == says or (when == "starting" and said == "")  # it may be ready by now
        assert not [path for path in shared if path.exists()]
        while os.listdir(folder):  # mpiexec ends after its ranks
            time.sleep(0.05)


def test_ranks_that_do_not_leave_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that start on a busy machine, or load a large model: they leave no shared memory either."""
    monkeypatch.setattr(remote, "ENDING", 0)
    words = [sys.executable, "-m", "mpillm", "ranks", str(tmp_path / "socket"), "-n", "2"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        listener.settimeout(HANGS)
        started = subprocess.Popen(words, start_new_session=True, env=remote._environment())
        with listener.accept()[0]:  # rank 0 waits for its job
            processes = [psutil.Process(started.pid), *below(started.pid)]
            shared = shared_by(processes)
            assert shared
            remote._Held(process=started).end()
    assert not psutil.wait_procs(processes, timeout=HANGS)[1]
    assert not [path for path in shared if path.exists()]


def test_ranks_whose_caller_has_gone(tmp_path: Path) -> None:
    """It was interrupted before it knew of them."""
    words = [sys.executable, "-m", "mpillm", "ranks", str(tmp_path / "socket"), "-n", "2"]
    assert subprocess.run(words, env=remote._environment(), timeout=HANGS, check=False).returncode == 0


JOB = """
import sys
from mpillm import Job

body = {"max_tokens": 400}
Job(model=sys.argv[1], input="in.jsonl", output="out", sampling=body, memory={"kv": "64MiB"}).run(2)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_stops_with_the_script_that_runs_it(number: signal.Signals, tmp_path: Path) -> None:
    """Otherwise the same call, which continues it, would find the run of a script that is gone in its directory."""
    lines = [{"prompt": f"the quick {n}", "ignore_eos": True} for n in range(2000)]
    write_lines(tmp_path / "in.jsonl", lines)
    words = [sys.executable, "-c", JOB, CHAT]
    with subprocess.Popen(words, cwd=tmp_path, env=clean_environment(), stderr=subprocess.DEVNULL) as caller:
        journal = tmp_path / "out/journal"
        while not journal.exists() or not journal.stat().st_size:
            assert caller.poll() is None
            time.sleep(0.05)
        started = psutil.Process(caller.pid).children(recursive=True)
        assert len(started) >= 4  # launch, mpiexec, two ranks
        caller.send_signal(number)
    assert not psutil.wait_procs(started, timeout=HANGS)[1]
    with contextlib.closing(Reader(tmp_path / "out")) as reader:
        assert reader.look().state == "stopped"
