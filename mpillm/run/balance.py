"""Decides when a run changes its layout because a rank has become slow, or fast again.

Ranks report to rank 0 how many seconds they have computed. Relative to each other these should match the model of a
step's time; a rank that takes longer makes the others of its replica wait. Then the speeds are corrected, and if
another division of the layers is clearly faster for the remaining work, the run continues with it: everything computed
is in the journal, and any rank can load any layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from mpillm.comm.counters import MessageCounters
from mpillm.comm.mailbox import Mailbox
from mpillm.partition import grid
from mpillm.planning.layout import replicas_in_words
from mpillm.planning.machines import Machines
from mpillm.planning.speed import Speed
from mpillm.run.progress import Slowest
from mpillm.run.session import Session
from mpillm.store import report

AGAIN = 256  # sent to the other ranks instead of an exit code if the layout changes
WINDOW = 10.0  # seconds over which ranks are compared
TELL_EVERY = 1.0  # seconds between two reports of a rank
SOON = 3.0  # seconds of a window after which its slowest rank is named
UNEVEN = 1.5  # a rank is slow if it takes this multiple of its planned time, relative to the others
BUSY = 0.3  # and if it computes for at least this share of the time; else the others do not wait for it
GAIN = 1.2  # the layout changes if the remaining work becomes faster by this factor
COST = 20.0  # and by at least this many seconds


class Busy(msgspec.Struct, tag="busy", frozen=True):
    """From any rank but 0: the seconds that it has computed so far, without its waits for other ranks."""

    seconds: float
    last: bool = False  # this is its last report


class Teller:
    """The side of the other ranks: reports to rank 0 at intervals."""

    def __init__(self, session: Session) -> None:
        self._session, self._told = session, time.monotonic()
        self._mailbox = Mailbox(session.world, MessageCounters())  # not counted in the report

    def tell(self) -> None:
        """Send a report, if it is time."""
        if time.monotonic() > self._told + TELL_EVERY:
            self._told = time.monotonic()
            self._send(Busy(busy_seconds(self._session)))

    def end(self) -> None:
        """Send the last report. Rank 0 waits for it, because MPI requires that every message is received."""
        self._send(Busy(busy_seconds(self._session), last=True))
        self._mailbox.flush(float("inf"))

    def _send(self, busy: Busy) -> None:
        self._mailbox.send(msgspec.msgpack.encode(busy), 0)


class Balance:
    """Rank 0's side: compares the ranks."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._machines = session.machines if session.machines.speeds else _assumed(session.machines)
        self._planned = session.choice.rank_seconds(self._machines, session.chosen)
        self._since = time.monotonic()
        # The time and the computed seconds of each rank's last report, and of the last one before the window.
        self._reports: dict[int, tuple[float, float]] = {}
        self._before: dict[int, tuple[float, float]] = {}
        self._suspected: int | None = None  # the rank that was slow in the last window
        self._slowest: Slowest | None = None

    def note(self, rank: int, busy: Busy) -> None:
        """Note the report of a rank."""
        self._before.setdefault(rank, (self._since, 0.0))
        self._reports[rank] = (time.monotonic(), busy.seconds)

    def look(self, left: Callable[[], float]) -> Slowed | None:
        """Return the slow rank if the layout should change, else None; `left` gives the seconds of remaining work."""
        passed = time.monotonic() - self._since
        if passed < WINDOW:
            return None
        ranks, busy = range(self._session.world.size), self._busy()
        self._before, self._since = dict(self._reports), time.monotonic()
        if min(busy) <= 0:
            return None
        ratios = self._beside_others(busy)
        slowest = max(ranks, key=ratios.__getitem__)
        stands_out = ratios[slowest] > UNEVEN and busy[slowest] > BUSY
        before, self._suspected = self._suspected, slowest if stands_out else None
        if not stands_out or before != slowest:
            return None
        known = self._machines.speeds
        speeds = [speed.shared_by(ratio) for speed, ratio in zip(known, ratios, strict=True)]
        gain = self._session.choice.gain(replace(self._machines, speeds=speeds), self._session.chosen)
        if gain < GAIN or left() * (1 - 1 / gain) < COST:
            return None
        others = statistics.mean(busy[rank] for rank in ranks if rank != slowest)
        return Slowed(
            f"Rank {slowest} on {self._session.world.hosts[slowest]} computed for {busy[slowest]:.0%} of "
            f"the last {passed:.0f} s, the others for {others:.0%}",
            known,
            ratios,
        )

    def slowest(self) -> Slowest | None:
        """Return the rank for which the others wait in this window, or waited in the last one if it has just begun."""
        if time.monotonic() - self._since > SOON:
            busy, hosts = self._busy(), self._session.world.hosts
            rank = report.slowest(busy)
            self._slowest = None
            if rank is not None:
                name = f"rank {rank} on {hosts[rank]}" if len(set(hosts)) > 1 else f"rank {rank}"
                self._slowest = Slowest(name, busy[rank])
        return self._slowest

    def _busy(self) -> list[float]:
        """Return the share of the time in which each rank computed, from the window's beginning to its last report."""
        self.note(0, Busy(busy_seconds(self._session)))
        shares = []
        for rank in range(self._session.world.size):
            then, had = self._before.get(rank, (self._since, 0.0))
            now, has = self._reports.get(rank, (then, had))
            shares.append((has - had) / (now - then) if now > then else 0.0)
        return shares

    def _beside_others(self, busy: Sequence[float]) -> list[float]:
        """Return, for each rank, its time divided by the planned time, relative to the fastest rank of its replica."""
        ratios = [share / planned for share, planned in zip(busy, self._planned, strict=True)]
        return [
            ratios[rank] / min(ratios[other] for other in replica.ranks)
            for replica in self._session.replicas
            for rank in replica.ranks
        ]


@dataclass(frozen=True)
class Slowed:
    """Describes the slow rank; for all ranks, the factor by which they took longer than `planned`."""

    who: str
    planned: Sequence[Speed]
    ratios: Sequence[float]


def what_was_slow(slowed: Slowed, session: Session, seconds: float) -> str:
    """Return a line for the report: which rank was slow, and how the run continued with `session` after `seconds`."""
    layers = dict.fromkeys(
        "-".join(
            str(len(grid.stage_layers(session.config.n_layers, place)))
            for place in replica.places[:: replica.shards]
        )
        for replica in session.replicas
    )
    shape = f"{replicas_in_words(session.replicas)}, layers {', '.join(layers)}"
    return f"{slowed.who}; after {seconds:.1f} s the run continues as {shape}."


def is_failure(code: int) -> bool:
    """Return whether engines stop because of an error or an interruption, not at the end or for another layout."""
    return code not in (0, AGAIN)


def watched(session: Session) -> bool:
    """Return whether ranks are compared: only ranks of the same replica wait for each other."""
    return any(len(replica.ranks) > 1 for replica in session.replicas)


def busy_seconds(session: Session) -> float:
    """Return the seconds so far in which this rank has computed steps, without its waits for other ranks."""
    counters = session.counters
    return session.worker.seconds - counters.all_reduce.seconds - counters.pipe.seconds


def _assumed(machines: Machines) -> Machines:
    return replace(machines, speeds=[machines.speed_of(rank) for rank in range(machines.ranks)])
