"""One start of mpiexec for a command that nothing starts again: its lines are shown, and its end is told."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from mpillm.comm.launch import STOPS, Library
from mpillm.errors import Interrupted
from mpillm.launching.hostfile import HostSlots, write_hosts
from mpillm.launching.mpiexec import Settings, command, ranks_of, stopped_by
from mpillm.launching.remarks import Remarks
from mpillm.launching.watch import run_watched

# How mpiexec ends after Ctrl-C: Open MPI's, and MPICH's after the second one.
_INTERRUPTED = (1, 130, 255, -signal.SIGINT)
_SIGNALS = range(4, 32)  # the exit code of MPICH's mpiexec if a signal ended a rank: no code of mpillm


def once(
    library: Library,
    settings: Settings,
    hosts: Sequence[HostSlots],
    program: Sequence[str],
    say: Callable[[str], None],
    remarks: Remarks,
    attended: bool = False,
) -> int:
    """Return the exit code of `program` on these hosts, or on this machine: 75 if it was stopped before its end.

    All ranks end when one dies. `say` tells the user what no rank has said. Somebody types on the terminal for a
    program that is `attended`, and leaves it with Ctrl-C.
    """
    told: list[int] = []

    def tell(number: int, _frame: FrameType | None) -> None:
        told.append(number)

    def shall_stop() -> bool:  # the terminal itself tells an attended mpiexec of Ctrl-C
        return any(not attended or number != signal.SIGINT for number in told)

    before = [signal.signal(number, tell) for number in STOPS]
    try:
        with tempfile.TemporaryDirectory(prefix="mpillm-") as name:
            hostfile = Path(name) / "hosts" if hosts else None
            if hostfile:
                write_hosts(hostfile, hosts, library)
            ranks = ranks_of(settings, hosts)
            words = command(library, settings, ranks, hostfile, Path(name), restarted=False)
            code = run_watched([*words, *program], remarks, shall_stop, attended=attended)
    finally:
        for number, handler in zip(STOPS, before, strict=True):
            signal.signal(number, handler)
    cause = remarks.cause()
    # Open MPI's code is 0 also after it has lost a daemon.
    if (code == 0 and (told or cause is None)) or (
        attended and signal.SIGINT in told and code in _INTERRUPTED and cause is None
    ):
        return 0
    if told and not attended:
        say(stopped_by(signal.Signals(told[0])))
        return Interrupted.exit_code
    if cause is None and attended and code in _SIGNALS:
        cause = f"a rank was ended by {signal.Signals(code).name}"
    if cause is not None:
        say(f"The ranks ended ({cause}); run the same command again.")
        return Interrupted.exit_code
    remarks.show()
    return code
