"""When a run should be laid out anew because some rank has become slow, or fast again.

Ranks tell rank 0 now and then how long they have computed. Those of a layout take about as long as the model of a
step's time says, in proportion; one that takes longer than that keeps the others of its replica waiting. Then their
speeds are corrected, and if another division of the layers is clearly faster for what is left to do, the run goes on
with it: what is computed is in the journal, and any rank can load any layer.
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
from mpillm.planning.estimate import speed_of
from mpillm.planning.layout import replicas_in_words
from mpillm.planning.machines import Machines
from mpillm.planning.speed import Speed
from mpillm.run.session import Session

AGAIN = 256  # what the other ranks are told instead of an exit code when the run is laid out anew
WINDOW = 10.0  # seconds over which ranks are compared
TELL_EVERY = 1.0  # seconds after which a rank tells how long it has computed
UNEVEN = 1.5  # how many times as long as planned, beside the others, a rank must take
BUSY = 0.3  # the part of the time in which it must compute: else the others do not wait for it
GAIN = 1.2  # how many times as fast what is left must become
COST = 20.0  # seconds that must be saved at least


class Busy(msgspec.Struct, tag="busy", frozen=True):
    """From any rank but 0: the seconds that it has computed so far, without waiting for other ranks."""

    seconds: float
    last: bool = False  # it tells no more


class Teller:
    """Another rank's side: tells rank 0 now and then."""

    def __init__(self, session: Session) -> None:
        self._session, self._told = session, time.monotonic()
        self._mailbox = Mailbox(session.world, MessageCounters())  # of which reports need not know

    def tell(self) -> None:
        """Tell, if it is time."""
        if time.monotonic() > self._told + TELL_EVERY:
            self._told = time.monotonic()
            self._send(Busy(busy_seconds(self._session)))

    def end(self) -> None:
        """Tell for the last time: rank 0 waits for that, for a message that nobody takes is an error of MPI's."""
        self._send(Busy(busy_seconds(self._session), last=True))
        self._mailbox.flush(float("inf"))

    def _send(self, busy: Busy) -> None:
        self._mailbox.send(msgspec.msgpack.encode(busy), 0)


class Balance:
    """Rank 0's side: compares the ranks."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._machines = session.machines if session.machines.speeds else _assumed(session.machines)
        self._planned = session.choice.rank_seconds(self._machines, session.replicas)
        self._busy: dict[int, float] = {}  # as each rank has told last
        self._before: dict[int, float] = {}  # at the beginning of the window
        self._since = time.monotonic()
        self._suspected: int | None = None  # the rank that stood out in the last window

    def note(self, rank: int, busy: Busy) -> None:
        """A rank has told."""
        self._busy[rank] = busy.seconds
        self._before.setdefault(rank, busy.seconds)

    def look(self, left: Callable[[], float]) -> Slowed | None:
        """The rank for which the run should be laid out anew, if any; `left` seconds are still to be computed."""
        passed = time.monotonic() - self._since
        if passed < WINDOW:
            return None
        ranks = range(self._session.world.size)
        self.note(0, Busy(busy_seconds(self._session)))
        done = [self._busy.get(rank, 0.0) - self._before.get(rank, 0.0) for rank in ranks]
        self._before, self._since = dict(self._busy), time.monotonic()
        if min(done) <= 0:
            return None
        ratios = self._beside_others(done)
        slowest = max(ranks, key=ratios.__getitem__)
        stands_out = ratios[slowest] > UNEVEN and done[slowest] > BUSY * passed
        before, self._suspected = self._suspected, slowest if stands_out else None
        if not stands_out or before != slowest:
            return None
        known = self._machines.speeds
        speeds = [speed.shared_by(ratio) for speed, ratio in zip(known, ratios, strict=True)]
        gain = self._session.choice.gain(replace(self._machines, speeds=speeds), self._session.chosen)
        if gain < GAIN or left() * (1 - 1 / gain) < COST:
            return None
        others = statistics.mean(done[rank] for rank in ranks if rank != slowest)
        return Slowed(
            f"Rank {slowest} on {self._session.world.hosts[slowest]} computed for {done[slowest] / passed:.0%} of "
            f"the last {passed:.0f} s, the others for {others / passed:.0%}",
            known,
            ratios,
        )

    def _beside_others(self, done: Sequence[float]) -> list[float]:
        """How many times as long as planned each rank has computed, beside the fastest one of its replica."""
        ratios = [seconds / planned for seconds, planned in zip(done, self._planned, strict=True)]
        return [
            ratios[rank] / min(ratios[other] for other in replica.ranks)
            for replica in self._session.replicas
            for rank in replica.ranks
        ]


@dataclass(frozen=True)
class Slowed:
    """The rank that keeps others waiting, in words; and of all ranks how many times as long as `planned` they took."""

    who: str
    planned: Sequence[Speed]
    ratios: Sequence[float]


def what_was_slow(slowed: Slowed, session: Session, seconds: float) -> str:
    """A line for the report: who was slow, and how the run went on with `session` after so many seconds."""
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
    """Whether engines stop because of an error or an interruption, rather than at the end or to be laid out anew."""
    return code not in (0, AGAIN)


def watched(session: Session) -> bool:
    """Whether ranks can be slow beside others: those of one replica wait for each other."""
    return any(len(replica.ranks) > 1 for replica in session.replicas)


def busy_seconds(session: Session) -> float:
    """Seconds so far in which this rank has worked on steps, without waiting for other ranks."""
    counters = session.counters
    return session.worker.seconds - counters.all_reduce.seconds - counters.pipe.seconds


def _assumed(machines: Machines) -> Machines:
    return replace(machines, speeds=[speed_of(machines, rank) for rank in range(machines.ranks)])
