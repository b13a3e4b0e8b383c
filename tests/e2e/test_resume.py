"""Killed in the middle: the same command goes on, and ends in the bytes of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import Mpi

from .jobs import command, mixed_lines, run, write_lines

pytestmark = pytest.mark.mpi


def start(mpi: Mpi, ranks: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(word) for word in mpi.command(ranks, *arguments)],
        env=mpi.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Python processes below mpiexec."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in below if "mpillm" in process.cmdline() and "-m" in process.cmdline()]


def wait_for_results(journal: Path, launcher: subprocess.Popen[bytes], nbytes: int) -> None:
    """Until the journal has grown past its beginning, and so holds some results."""
    until = time.monotonic() + 60
    begin = None
    while time.monotonic() < until and launcher.poll() is None:
        size = journal.stat().st_size if journal.exists() else 0
        begin = size if begin is None and size else begin
        if begin is not None and size > begin + nbytes:
            return
        time.sleep(0.01)
    assert launcher.poll() is None, "the run ended before it could be disturbed"


@pytest.mark.parametrize(
    ("victim", "number"), [("rank 1", signal.SIGKILL), ("rank 0", signal.SIGKILL), ("all", signal.SIGTERM)]
)
def test_goes_on_after(victim: str, number: signal.Signals, mpi: Mpi, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(200, seed=4, tokens=60))
    output, settings = tmp_path / "out", ["batch.max_num_seqs=4"]
    launcher = start(mpi, 2, command(source, output, *settings))
    try:
        wait_for_results(output / "journal", launcher, 4000)
        victims = ranks_of(launcher)
        assert len(victims) == 2
        if victim == "all":
            os.kill(launcher.pid, number)
        else:
            victims[int(victim[-1])].send_signal(number)
        assert launcher.wait(30) != 0
        _, alive = psutil.wait_procs(victims, timeout=10)
        assert not alive, "a rank was left behind"
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert not (output / "results.jsonl").exists()
    again = run(mpi, 2, source, output, *settings)
    assert again.returncode == 0, again.stderr
    assert "by earlier runs" in again.stderr
    assert run(mpi, 1, source, tmp_path / "undisturbed").returncode == 0
    for name in ("results.jsonl", "results.h5"):
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
