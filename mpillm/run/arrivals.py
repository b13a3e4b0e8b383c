"""Rank 0 computes as soon as its own replica is ready; the leaders of the others tell it when theirs are.

Or why they cannot be: such an error ends the run as if all ranks had waited for each other.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import msgspec

from mpillm.comm.counters import MessageCounters
from mpillm.comm.mailbox import Mailbox
from mpillm.comm.transfer import Tag
from mpillm.comm.world import World
from mpillm.errors import MpillmError
from mpillm.partition.replicas import Replicas
from mpillm.words import some_of

LOOK_EVERY = 0.5  # seconds between two checks of other things while rank 0 waits for a leader


class Ready(msgspec.Struct, frozen=True):
    """From a leader: what rank 0 must know of each rank of its replica, or the error with which they end."""

    states: Sequence[str] = ()  # of the model's files (`Watch.state`)
    kernels: Sequence[str] = ()  # the path of the kernels
    error: bytes = b""  # a pickled MpillmError, or empty


class Arrivals:
    """The replicas that are ready, as rank 0 knows them; the leaders of the others `tell` it."""

    def __init__(self, world: World, replicas: Replicas) -> None:
        self._world, self._own = world, Ready()
        self._mailbox = Mailbox(world, MessageCounters(), Tag.READY)  # not counted in the report
        self._missing = {replica.first: replica.ranks for replica in replicas[1:]}
        #: the states of the model's files on the ranks that are ready
        self.states = set[str]()
        self._kernels = dict[int, str]()
        #: leaders whose ranks end with an error
        self.failed = set[int]()

    def note(self, ranks: Sequence[int], ready: Ready) -> None:
        """Note the facts of a replica with these ranks; each rank those of its own one."""
        self._own = ready
        self.states.update(ready.states)
        self._kernels.update(zip(ranks, ready.kernels, strict=True))

    def tell(self, error: MpillmError | None = None) -> None:
        """On the leader of another replica: tell rank 0 that its ranks are ready, or why they cannot be."""
        ready = self._own if error is None else Ready(error=pickle.dumps(error))
        self._mailbox.send(msgspec.msgpack.encode(ready), 0)

    @property
    def complete(self) -> bool:
        """Whether rank 0 has heard from all leaders."""
        return not self._missing

    def look(self) -> bool:
        """On rank 0: return whether more replicas are ready than before. Raises the error of one that cannot be."""
        before = len(self._missing)
        while self._missing and (message := self._mailbox.receive()) is not None:
            self._take(*message)
        return len(self._missing) < before

    def wait(self) -> None:
        """On rank 0: wait until all replicas are ready; see `look`."""
        while self._missing:
            if (message := self._mailbox.wait(LOOK_EVERY)) is not None:
                self._take(*message)

    @property
    def warnings(self) -> list[str]:
        """Warnings about ranks that differ, once all are ready."""
        return _with_numpy(self._world.hosts, self._kernels) if self.complete else []

    def _take(self, leader: int, data: bytes) -> None:
        ready, ranks = msgspec.msgpack.decode(data, type=Ready), self._missing.pop(leader)
        if ready.error:
            self.failed.add(leader)
            error: MpillmError = pickle.loads(ready.error)
            raise error
        self.note(ranks, ready)


def _with_numpy(hosts: Sequence[str], kernels_of_ranks: dict[int, str]) -> list[str]:
    """Return a warning if only some of the ranks have compiled kernels, whose last digits are not those of NumPy."""
    slow = [
        f"rank {rank} on {hosts[rank]}" for rank, path in sorted(kernels_of_ranks.items()) if path == "numpy"
    ]
    if len(slow) in (0, len(hosts)):
        return []
    return [
        f"NumPy computes on {some_of(slow, 'rank')}, far slower than the compiled kernels of the other ranks, and "
        "answers may differ in their last digits from those of other runs; `mpillm doctor` says why."
    ]
