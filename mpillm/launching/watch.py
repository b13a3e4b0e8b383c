"""One start of mpiexec, watched until its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mpillm.launching.mpiexec import end_session, ranks_below, start, tell_to_stop
from mpillm.launching.remarks import Remarks

LOOK = 0.2  # seconds between two looks at mpiexec
WATCH = 2.0  # seconds between two looks at the ranks
LINGER = 10.0  # seconds for mpiexec to end when no rank runs here, and nothing tells that others do
ASK = 15.0  # seconds between two questions to the hosts, while no rank runs yet
STOPPING = 30.0  # seconds for the ranks to end when they are told to


def run_watched(
    words: Sequence[str],
    remarks: Remarks,
    shall_stop: Callable[[], bool],
    have_worked: Callable[[], bool] = lambda: False,
    cannot_start: Callable[[], bool] = lambda: False,
    attended: bool = False,
) -> int:
    """Start mpiexec with `words` and return its exit code (that of subprocess) when it has ended.

    The ranks are told to stop as soon as `shall_stop` returns True. `have_worked` tells whether ranks, which may be on
    other hosts, have worked since it was called before. mpiexec waits without limit for hosts that are out of reach, so
    it is killed if there were ranks and no more are seen, or if none was ever seen and `cannot_start` returns True.
    `attended`: see `start`.
    """
    launcher = start(words, remarks, attended)
    give_up = active = float("inf")  # when mpiexec is killed, and when ranks were seen last
    looked = asked = time.monotonic()
    try:
        while launcher.poll() is None and time.monotonic() < give_up:
            remarks.listen(LOOK)
            now = time.monotonic()
            if now - looked > WATCH:
                looked = now
                if have_worked() or ranks_below(launcher.pid):
                    active = now
                elif now - active > LINGER:
                    give_up = min(give_up, now)
                elif active == float("inf") and now - asked > ASK:
                    asked = now
                    if cannot_start():
                        give_up = now
            if shall_stop() and give_up == float("inf"):
                tell_to_stop(launcher)
                give_up = now + STOPPING
        remarks.waits = launcher.poll() is None and not shall_stop()
    finally:
        end_session(launcher)
        remarks.close()
    return launcher.returncode
