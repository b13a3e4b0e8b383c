"""`mpillm launch`: starts a run again after a kill, makes it larger, and leaves nobody behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mpillm.store.status import Reader
from tests.conftest import HANGS, Mpi, run_bounded
from tests.e2e.jobs import command, mixed_lines, run, write_lines
from tests.model.golden import model_path

pytestmark = pytest.mark.mpiexec
SETTINGS = ["batch.max_num_seqs=2"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", mixed_lines(80, seed=4, tokens=60))


@contextlib.contextmanager
def launched(mpi: Mpi, source: Path, output: Path, *where: str) -> Iterator[subprocess.Popen[str]]:
    """A supervisor at work; killed at the end of the block if it still is."""
    words = command(source, output, *SETTINGS)
    process = subprocess.Popen(
        [sys.executable, *words[:2], "launch", *where, *words[2:]],
        env=mpi.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ranks(output: Path) -> list[psutil.Process]:
    """The processes that work on this output, without mpiexec and its supervisor."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if str(output) in words and words[1:4] == ["-m", "mpillm", "run"]:
                found.append(process)
    return found


def wait_for_results(output: Path, nbytes: int = 6000) -> None:
    journal = output / "journal"
    while not (journal.exists() and journal.stat().st_size > nbytes):
        time.sleep(0.05)


def assert_nobody_left(output: Path) -> None:
    _, left = psutil.wait_procs(ranks(output), timeout=HANGS)
    for process in left:
        process.kill()
    assert not left


def test_goes_on_after_a_kill_and_grows(mpi: Mpi, source: Path, tmp_path: Path) -> None:
    output, hosts = tmp_path / "out", tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n")
    with launched(mpi, source, output, "--hostfile", str(hosts)) as supervisor:
        wait_for_results(output)
        only = ranks(output)
        assert len(only) == 1
        only[0].kill()
        while psutil.Process(supervisor.pid).children():  # until mpiexec has ended; then it waits a second
            time.sleep(0.01)
        hosts.write_text("localhost slots=3\n")  # three do not work with this model, two do
        _, said = supervisor.communicate(timeout=HANGS)
        assert supervisor.returncode == 0, said
    assert "The run ended before it was complete" in said
    assert "by earlier runs" in said
    assert '"shards":2' in (output / "report.json").read_text().replace(" ", "")
    assert_nobody_left(output)
    assert run(mpi, 1, source, tmp_path / "undisturbed").returncode == 0
    for name in ("results.jsonl", "results.h5"):
        assert (output / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_ranks_that_are_stopped_do_not_advise_what_launch_does(
    mpi: Mpi, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with launched(mpi, source, output, "-n", "2") as supervisor:
        wait_for_results(output)
        for rank in ranks(output):
            rank.terminate()
        _, said = supervisor.communicate(timeout=HANGS)
        assert supervisor.returncode == 0, said
    assert "mpillm: Stopped by SIGTERM.\n" in said
    assert "by earlier runs" in said
    assert "run the same command again" not in said


def test_hosts_that_are_added_are_used(openmpi: Mpi, source: Path, tmp_path: Path) -> None:
    output, hosts = tmp_path / "out", tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n")
    with launched(openmpi, source, output, "--hostfile", str(hosts)) as supervisor:
        wait_for_results(output, 1)
        at_work = ranks(output)
        assert at_work
        for rank in at_work:
            rank.suspend()  # so that it is not done before the supervisor has looked
        hosts.write_text("localhost slots=2\n")
        assert supervisor.stderr is not None
        while "The hostfile has changed" not in (line := supervisor.stderr.readline()):
            assert line, "the supervisor has ended"
        for rank in at_work:
            rank.resume()
        _, said = supervisor.communicate(timeout=HANGS)
    assert supervisor.returncode == 0, said
    assert '"shards":2' in (output / "report.json").read_text().replace(" ", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_stops_the_supervisor_stops_the_run(
    mpi: Mpi, source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    with launched(mpi, source, output, "-n", "2") as supervisor:
        wait_for_results(output)
        os.kill(supervisor.pid, number)
        supervisor.wait()
        assert supervisor.returncode == (75 if number == signal.SIGTERM else -number)
        if number == signal.SIGTERM:
            said = supervisor.communicate(timeout=HANGS)[1]
            assert said.count("Stopped by") == 1, said  # by the supervisor, and not by a rank as well
            assert "Stopped by SIGTERM; run the same command again to continue." in said
        assert_nobody_left(output)
    if number == signal.SIGTERM:  # begun answers are saved too, which have no checkpoint by then
        with contextlib.closing(Reader(output)) as reader:
            assert reader.look().partial > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["-n", "2", "plan"],
            "launch starts run, doctor, chat, serve, bench and pack; type mpillm plan without it.",
        ),
        (["-n", "0", "run"], "-n 0 is not a number of ranks"),
        (["--hostfile", "/nowhere", "run"], "The hostfile /nowhere does not exist; mpillm init"),
    ],
)
def test_mistakes_are_not_repeated(openmpi: Mpi, words: list[str], said: str) -> None:
    done = run_bounded([sys.executable, "-m", "mpillm", "launch", *words], env=openmpi.environment())
    assert done.returncode == 2
    assert said in done.stderr


def test_a_check_is_started_once_on_the_hosts_of_a_hostfile(mpi: Mpi, tmp_path: Path) -> None:
    """mpiexec's words for both MPIs; exit codes are those of the ranks, and no banner follows."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    words = [sys.executable, "-m", "mpillm", "launch", "--hostfile", str(hosts), "doctor", "--model"]
    done = run_bounded([*words, model_path("chat")], env=mpi.environment())
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 host" in done.stdout
    assert "is bound to" not in done.stdout
    done = run_bounded([*words, tmp_path / "nosuch"], env=mpi.environment())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nosuch does not exist" in done.stderr


def test_a_launch_by_a_launcher(openmpi: Mpi) -> None:
    """Each rank would start all ranks again."""
    done = openmpi.run(2, "-m", "mpillm", "launch", "-n", "2", "run")
    assert done.returncode == 2
    assert done.stderr.count("launch ... without Open MPI's mpiexec before it.") == 1
