"""A rank of what `mpillm launch` starts once is killed: one sentence, exit code 75, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.api.test_left_behind import shared_by
from tests.conftest import HANGS, Mpi
from tests.job_helpers import CHAT

COMMANDS = {
    "chat": ["--model", str(CHAT)],
    "serve": ["--model", str(CHAT), "--port", "0", "--data", "served"],
    "bench": ["--synthetic", "llama-1b:1", "--what", "prefill", "--repeats", "1000"],
}


def ranks_of(launch: int, count: int) -> list[psutil.Process]:
    """The ranks that a process has started, by number."""
    while True:
        with contextlib.suppress(psutil.Error):
            found = {}
            for process in psutil.Process(launch).children(recursive=True):
                number = process.environ().get("OMPI_COMM_WORLD_RANK", process.environ().get("PMI_RANK"))
                if number is not None and "mpillm" in process.cmdline()[:4]:
                    found[int(number)] = process
            if len(found) == count:
                return [found[number] for number in range(count)]
        time.sleep(0.02)


def mapped(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.mpiexec
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_killed(mpi: Mpi, name: str, victim: int, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        env = mpi.environment(TMPDIR=folder, PATH=f"{mpi.mpiexec.parent}{os.pathsep}{os.environ['PATH']}")
        said = tmp_path / "said"
        words = [sys.executable, "-m", "mpillm", "launch", "-n", "2", name, *COMMANDS[name]]
        with (
            said.open("wb") as file,
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=file, stderr=file, env=env, cwd=tmp_path) as started,
        ):  # fmt: skip
            ranks = ranks_of(started.pid, 2)
            while not all("/_compiled." in mapped(rank) for rank in ranks):  # loaded when all have met
                time.sleep(0.02)
            time.sleep(1)
            shared = shared_by(ranks)
            ranks[victim].send_signal(signal.SIGKILL)
            assert started.wait(HANGS) == 75
        last = said.read_text().splitlines()[-1]
        assert last.startswith("mpillm: The ranks ended (a rank"), last
        assert last.endswith(" was ended by SIGKILL); run the same command again."), last
        assert not psutil.wait_procs(ranks, HANGS)[1]
        assert not [path for path in shared if path.exists()]
        assert os.listdir(folder) == []
