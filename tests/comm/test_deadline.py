"""Ranks that fall silent end the world with a sentence; ranks that are busy do not; nobody outlives the launcher."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from mpillm.comm import deadline, heartbeat, launch
from mpillm.comm.rendezvous import listen
from mpillm.errors import JobError
from tests.conftest import HANGS, Mpi, run_bounded

pytestmark = pytest.mark.mpiexec

PROGRAM = Path(__file__).with_name("silences.py")


@pytest.mark.parametrize("victim", ["0", "2"])
def test_a_stopped_rank_ends_the_world(mpi: Mpi, victim: str) -> None:
    done = mpi.run(3, PROGRAM, "stopped", env={"VICTIM": victim, "MPILLM_DEADLINE": "1.5"})
    # MPICH's mpiexec may tell instead by which signal it ended the stopped one.
    assert done.returncode in ({75, 9} if mpi.name == "mpich" else {75})
    said = (
        rf"Rank {victim} on \S+ has not responded for 1\.5 s: it is stopped, .*run the same command "
        r"again to continue"
    )
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize("how", ["busy", "waits_for_a_disk"])
def test_a_slow_rank_is_not_silent(mpi: Mpi, how: str, tmp_path: Path) -> None:
    env = {
        "SECONDS": "2.5",
        "MPILLM_DEADLINE": "1.5",
    }  # on a crowded machine a heartbeat may be late by a second
    done = mpi.run(2, PROGRAM, how, tmp_path / "pipe", env=env)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_rank_that_hangs_ends_the_world(mpi: Mpi, tmp_path: Path, restarted: bool) -> None:
    """Its process lives, and its heartbeat goes on."""
    victim = "0" if mpi.name == "mpich" else "1"
    env = {"VICTIM": victim, "MPILLM_DEADLINE": "0.8"} | ({launch.RESTARTED: "1"} if restarted else {})
    done = mpi.run(2, PROGRAM, "hangs", tmp_path / "pipe", env=env)
    assert done.returncode == 75
    speaker = {"0": "mpillm:", "1": "[1@"}[victim]
    (said,) = (line for line in done.stderr.splitlines() if "This rank" in line)
    assert said.startswith(speaker)
    advice = "" if restarted else "; run the same command again to continue"
    assert said.endswith(f"This rank has made no progress for 0.8 s: it hangs{advice}.")


@pytest.mark.parametrize(
    ("how", "when", "ulfm"),
    [("stopped", "1", False), ("stopped", "1", True), ("killed", "1", True), ("killed", "0", True)],
)
def test_a_rank_that_is_lost_before_the_ranks_meet(openmpi: Mpi, how: str, when: str, ulfm: bool) -> None:
    """With ULFM the launcher ends neither the others nor who is stopped; they may not even have seen it."""
    mpiexec, *words = openmpi.command(3, PROGRAM, f"{how}_while_starting")
    done = run_bounded(
        [mpiexec, *(["--with-ft", "ulfm"] if ulfm else []), *words],
        env=openmpi.environment(MPILLM_DEADLINE="2", WHEN=when),
    )
    assert done.returncode == 75, done.stderr
    said = (
        r"^mpillm: A rank on \S+ was stopped or ended before all ranks were connected; run the "
        r"same command again to continue\.$"
    )
    assert len(re.findall(said, done.stderr, re.MULTILINE)) == 1, done.stderr


def test_ranks_that_do_not_meet_end(mpi: Mpi) -> None:
    """One that sleeps looks like any that starts slowly: only time tells."""
    # Not shorter: MPICH's mpiexec ends the others only after a rank that has spoken to it.
    done = mpi.run(2, PROGRAM, "asleep_while_starting", env={"MPILLM_DEADLINE": "0.5"})
    assert done.returncode in ({75, 9} if mpi.name == "mpich" else {75})
    assert (
        "mpillm: Not all ranks connected within 3 s: a rank does not start, its machine is down"
        in done.stderr
    )


def test_nobody_outlives_the_launcher(mpi: Mpi) -> None:
    """Not even a stopped rank, and without waiting for a deadline."""
    with subprocess.Popen(
        [str(word) for word in mpi.command(3, PROGRAM, "gone")],
        env=mpi.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        pids = [int(launcher.stdout.readline().split()[1]) for _ in range(3)]
        ranks = [psutil.Process(pid) for pid in pids]
        time.sleep(0.2)
        launcher.kill()
        _, left = psutil.wait_procs(ranks, timeout=HANGS)
        for process in left:
            process.kill()
        assert not left


def test_an_unidentified_connection() -> None:
    """Who does not know the token is sent away, and costs nothing."""
    listener, rendezvous = listen(60)
    beating = heartbeat.Heartbeat(0, ["here", "here"], rendezvous, listener, near=True)
    try:
        for words in (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", rendezvous.token + b"\xff\xff\xff\xff"):
            with socket.create_connection(("127.0.0.1", rendezvous.port), 5) as stranger:
                stranger.sendall(words)
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(16) == b""
    finally:
        beating.stop()


def test_strangers_who_say_nothing_keep_nobody_waiting() -> None:
    """A scanner that opens connections keeps rank 0 neither from being heard nor from letting ranks in."""
    listener, rendezvous = listen(1.0)
    beating = heartbeat.Heartbeat(0, ["here", "here"], rendezvous, listener, near=True)
    strangers: list[socket.socket] = []
    try:
        strangers += [
            socket.create_connection(("127.0.0.1", rendezvous.port), 5)
            for _ in range(heartbeat.MAX_UNIDENTIFIED + 20)
        ]
        strangers[-1].sendall(rendezvous.token)  # and no more
        with socket.create_connection(("127.0.0.1", rendezvous.port), 5) as rank:
            rank.sendall(rendezvous.token + b"\1\0\0\0")
            assert rank.recv(16, socket.MSG_WAITALL) == rendezvous.token[::-1]
            assert rank.recv(1) == b"."
            rank.sendall(b"-")
        assert strangers[0].recv(1) == b""  # one too many
        assert strangers[-1].recv(1) == b""  # too slow
    finally:
        beating.stop()
        for stranger in strangers:
            stranger.close()


def test_what_the_variable_may_say() -> None:
    assert deadline.limit({}) == deadline.LIMIT == 20
    assert deadline.limit({"MPILLM_DEADLINE": "0"}) == 0
    for wrong in ("soon", "-1", "inf", "nan"):
        with pytest.raises(JobError, match=f"MPILLM_DEADLINE = '{wrong}' is not a number of seconds"):
            deadline.limit({"MPILLM_DEADLINE": wrong})


def test_the_alarm_is_off_again() -> None:
    deadline.alarm(30)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    deadline.alarm(0)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
