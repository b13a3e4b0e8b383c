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
    LOOK,
    STOPPING,
    Settings,
    command,
    end_session,
    ranks_of,
    start,
    stopped_by,
    tell_to_stop,
)
from mpillm.launching.remarks import Remarks


def once(
    library: Library,
    settings: Settings,
    hosts: Sequence[HostSlots],
    program: Sequence[str],
    survivors: bool,
    say: Callable[[str], None],
    remarks: Remarks,
) -> int:
    """The exit code of `program` on these hosts, or on this machine: 75 if it was stopped before its end.

    `survivors` go on when a rank dies; else all end. `say` tells the user what no rank has said.
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
            words = command(library, settings, ranks, hostfile, Path(name), survivors)
            code = _ended([*words, *program], told, remarks)
    finally:
        for number, handler in zip(STOPS, before, strict=True):
            signal.signal(number, handler)
    if code == 0:
        return 0
    if told:
        say(stopped_by(signal.Signals(told[0])))
        return Interrupted.exit_code
    if cause := remarks.cause():
        say(f"The ranks ended ({cause}); run the same command again.")
        return Interrupted.exit_code
    remarks.show()
    return code


def _ended(words: Sequence[str], told: Sequence[int], remarks: Remarks) -> int:
    """mpiexec's exit code when it has ended; it and its ranks are stopped as soon as `told` has a signal."""
    launcher = start(words, remarks)
    give_up = float("inf")
    try:
        while launcher.poll() is None and time.monotonic() < give_up:
            remarks.listen(LOOK)
            if told and give_up == float("inf"):
                tell_to_stop(launcher)
                give_up = time.monotonic() + STOPPING
    finally:
        end_session(launcher)
        remarks.close()
    return launcher.returncode
