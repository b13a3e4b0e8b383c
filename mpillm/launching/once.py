"""One start of mpiexec for a command that nothing starts again: its lines are shown, and its end is told."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from mpillm.comm.launch import STOPS, Library
from mpillm.errors import Interrupted
from mpillm.launching.hostfile import HostSlots, write_hosts
from mpillm.launching.mpiexec import (
    LINGER,
    LOOK,
    STOPPING,
    WATCH,
    Settings,
    command,
    end_session,
    ranks_below,
    ranks_of,
    start,
    stopped_by,
    tell_to_stop,
)
from mpillm.launching.remarks import Remarks

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

    before = [signal.signal(number, tell) for number in STOPS]
    try:
        with tempfile.TemporaryDirectory(prefix="mpillm-") as name:
            hostfile = Path(name) / "hosts" if hosts else None
            if hostfile:
                write_hosts(hostfile, hosts, library)
            ranks = ranks_of(settings, hosts)
            words = command(library, settings, ranks, hostfile, Path(name), survivors=False)
            code = _ended([*words, *program], told, remarks, attended)
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


def _ended(words: Sequence[str], told: Sequence[int], remarks: Remarks, attended: bool) -> int:
    """Return mpiexec's exit code when it has ended; it and its ranks are stopped as soon as `told` has a signal.

    The terminal tells an attended mpiexec of Ctrl-C.
    """
    launcher = start(words, remarks, attended)
    give_up = float("inf")
    looked, active = time.monotonic(), float("inf")
    try:
        while launcher.poll() is None and time.monotonic() < give_up:
            remarks.listen(LOOK)
            now = time.monotonic()
            if now - looked > WATCH:
                looked = now
                if ranks_below(launcher.pid):
                    active = now
                elif now - active > LINGER:  # mpiexec waits for hosts that are out of reach
                    give_up = min(give_up, now)
            if give_up == float("inf") and any(not attended or number != signal.SIGINT for number in told):
                tell_to_stop(launcher)
                give_up = now + STOPPING
        remarks.waits = launcher.poll() is None and not told
    finally:
        end_session(launcher)
        remarks.close()
    return launcher.returncode
