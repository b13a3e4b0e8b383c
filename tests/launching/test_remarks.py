"""What mpiexec says is kept apart from what ranks say; the texts are those of Open MPI 5.0.11 and MPICH 5.0.2."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from mpillm.launching.remarks import Remarks

SSH = "ssh: connect to host door2 port 22: No route to host\n"
UNABLE = f"""{SSH}{"-" * 60}
A daemon failed to report back after being spawned. This could
be due to several factors, including inability to find the
daemon executable.

  Local host:    door1
  Remote host:   door2
  Daemon exit status: 255
{"-" * 60}
"""
LOST = f"""{"-" * 74}
PRTE has lost communication with a remote daemon.

  HNP daemon   : [prterun-door1-15858@0,0] on node door1
  Remote daemon: [prterun-door1-15858@0,1] on node door2

This is usually due to a failure of the TCP network
{"-" * 74}
"""
KILLED = f"""{"-" * 74}
prterun noticed that process rank 1 with PID 28441 on node door2 exited on
signal 9 (Killed).
{"-" * 74}
"""
ENDED = f"""
{"=" * 83}
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 27557 RUNNING AT door2
=   EXIT CODE: {{}}
=   CLEANING UP REMAINING PROCESSES
=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES
{"=" * 83}
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
This typically refers to a problem with your application.
Please see the FAQ page for debugging suggestions
"""
PROXY = """\
[proxy:0@door1] HYD_pmcd_pmip_control_cmd_cb (/mpich/src/pm/hydra/proxy/pmip_cb.c:490): assert (!closed) failed
[mpiexec@door1] main (/mpich/src/pm/hydra/mpiexec/mpiexec.c:270): process manager error waiting for completion
"""
PEER = f"""{"-" * 74}
An MPI communication peer process has unexpectedly disconnected.  This
usually indicates a failure in the peer process (e.g., a crash or
otherwise exiting without calling MPI_FINALIZE first).

  Local host: door1
  Local PID:  23496
  Peer host:  door2
{"-" * 74}
[door1:00000] *** An error occurred in Socket closed
[door1:00000] *** reported by process [4294443009,0]
[door1:00000] *** on a NULL communicator
[door1:00000] *** Unknown error
[door1:00000] *** MPI_ERRORS_ARE_FATAL (processes in this communicator will now abort,
[door1:00000] ***    and MPI will try to terminate your MPI job as well)
"""
SOCKET = "".join(line for line in PEER.splitlines(keepends=True) if "***" in line)
CLOSED = "Connection to door2 closed by remote host.\n"
DAEMON = """\
[mpiexec@door1] control_cb (/mpich/src/pm/hydra/mpiexec/pmiserv_cb.c:280): assert (!closed) failed
[mpiexec@door1] main (/mpich/src/pm/hydra/mpiexec/mpiexec.c:270): process manager error waiting for completion
"""
OTHER = """\
[1795976320.811209] [node3:844  :0]       tag_match.c:62   UCX  WARN  unexpected tag-receive descriptor was not matched
Abort(75) on node 1 (rank 1 in comm 496): application called MPI_Abort(comm=0x84000000, 75) - process 1
[door1:12433] PRTE ERROR: Not found in file odls_base_default_fns.c at line 1751
[warn] Epoll MOD(1) on fd 22 failed. Old events were 6; read change was 0 (none): Bad file descriptor
[door1:23547] plm:ssh: Warning: setpgid(23551,23551) failed in parent with errno=Permission denied(13)
[door1:22856] UNSUPPORTED DAEMON ERROR STATE: NO PATH TO TARGET
NBC_Progress: an error 77 was found during schedule 0x5612a8dcd490 at row-offset 0 - aborting the schedule
"""
ABORTED = f"""\
{"-" * 74}
MPI_ABORT was invoked on rank 0 in communicator MPI COMM 3 DUP FROM 0
  Errorcode: 70

NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
{"-" * 74}
{"-" * 74}
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated.
{"-" * 74}
"""
RANKS = """\
mpillm: 97 of 300 requests (32 %), 6501 tokens/s (6501 now), 00:09 left
[1@door2] The remaining ranks have not agreed within 3 s how to continue.
r0: ------------------------------------------------------------------
Traceback (most recent call last):
[door1:123] *** Process received signal ***
"""

Hear = Callable[..., tuple[Remarks, list[str], list[str]]]


@pytest.fixture
def heard() -> Hear:
    """What becomes of texts for stdout and stderr that come in pieces: the remarks, and the lines shown in each."""

    def hear(out: str, error: str = "") -> tuple[Remarks, list[str], list[str]]:
        shown: tuple[list[str], list[str]] = ([], [])
        remarks = Remarks(shown[0].append, shown[1].append)
        with remarks.pipes() as ends:
            for end, text in zip(ends, (out, error), strict=True):
                for begin in range(0, len(text), 7):
                    os.write(end, text[begin : begin + 7].encode())
                    remarks.listen(0.0001)
        remarks.close()
        return remarks, *shown

    return hear


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (UNABLE, "mpiexec could not start its daemon on door2, or lost it"),
        (LOST + UNABLE, "mpiexec lost its daemon on door2"),
        (PEER, "a rank on door2 was lost, or the connection to it"),
        (SOCKET, "a rank was lost, or the connection to it"),
        (SOCKET + KILLED, "a rank on door2 was ended by SIGKILL"),
        (PEER + KILLED, "a rank on door2 was ended by SIGKILL"),
        (KILLED, "a rank on door2 was ended by SIGKILL"),
        (ENDED.format(9) + PROXY, "a rank on door2 was ended by SIGKILL"),
        (ENDED.format(75), None),
        (SSH + PROXY, SSH.strip()),
        (CLOSED + DAEMON, "the connection to door2 was closed"),
        (DAEMON, "mpiexec lost its daemon on a host"),
        (OTHER, None),
    ],
)
def test_a_remark_is_kept_and_tells_what_was_lost(heard: Hear, text: str, cause: str | None) -> None:
    ranks = RANKS.splitlines()
    remarks, out, error = heard(f"{RANKS}\0\n{text}\0{RANKS}")
    assert out + error == ranks * 2
    assert remarks.cause() == cause
    remarks.show()
    assert out + error == [*ranks, *ranks, "", *text.splitlines()]


def test_that_a_rank_has_ended_is_not_shown(heard: Hear) -> None:
    remarks, out, error = heard(f"{OTHER}{ABORTED}{SSH}")
    remarks.show()
    assert out + error == [*OTHER.splitlines(), *SSH.splitlines()]


def test_a_rank_speaks_within_a_banner(
    heard: Hear,
) -> None:
    sentence, half = "mpillm: The results are in out.", "[0@door1] a line that never ends"
    begin, end = LOST[:75], LOST[75:]
    remarks, out, error = heard(f"{begin}{sentence}\n{end}{half}")
    assert out + error == [sentence, half]
    assert remarks.cause() == "mpiexec lost its daemon on door2"


def test_streams_that_are_apart_stay_apart(heard: Hear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    assert heard("an answer\n", f"{LOST}mpillm: what is wrong\n")[1:] == (
        ["an answer"],
        ["mpillm: what is wrong"],
    )
    monkeypatch.setattr(os.path, "samestat", lambda one, other: True)
    in_order = ["an answer", "mpillm: what is wrong"]
    assert heard("an answer\n", "mpillm: what is wrong\n")[1:] == (in_order, [])
