"""Messages between the leaders of replicas, each of which computes on its own and looks for them between its steps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mpillm.comm.counters import MessageCounters
from mpillm.comm.transfer import Outbox, Tag
from mpillm.comm.world import World

if TYPE_CHECKING:
    from mpi4py import MPI


class Mailbox:
    """Messages of any length between rank 0 and the leaders of the other replicas, which compute meanwhile.

    Neither side waits for the other: a large message arrives over several calls of `receive`.
    """

    def __init__(self, world: World, counters: MessageCounters, tag: Tag = Tag.REQUESTS) -> None:
        self._world, self._count, self._tag = world, counters.requests, tag
        self._outbox = Outbox(world, self._count)
        self._coming: list[tuple[int, bytearray, MPI.Request]] = []
        world.keep_alive(self._coming)

    def send(self, message: bytes, rank: int) -> None:
        """Send a message to a rank, in the background."""
        self._outbox.send(message, [rank], self._tag)

    def receive(self) -> tuple[int, bytes] | None:
        """Return the next message that has arrived, and the rank that sent it; None if there is none now."""
        from mpi4py import MPI

        self._outbox.progress()
        status = MPI.Status()
        while (message := self._world.comm.Improbe(MPI.ANY_SOURCE, self._tag, status)) is not None:
            data = bytearray(status.Get_count(MPI.BYTE))
            self._coming.append((status.Get_source(), data, message.Irecv([data, MPI.BYTE])))
        unfinished = set[int]()  # ranks with an earlier message that is still arriving
        for index, (source, data, request) in enumerate(self._coming):
            if source not in unfinished and request.Test():
                del self._coming[index]
                self._count.bytes_received += len(data)
                return source, bytes(data)
            unfinished.add(source)
        return None

    def wait(self, seconds: float) -> tuple[int, bytes] | None:
        """Return the next message; None if none arrives within `seconds` seconds."""
        until = time.monotonic() + seconds
        found: list[tuple[int, bytes]] = []

        def arrived() -> bool:
            if (message := self.receive()) is not None:
                found.append(message)
            return bool(found) or time.monotonic() > until

        self._count.waited(self._world.wait(arrived))
        return found[0] if found else None

    def flush(self, seconds: float) -> None:
        """Wait until all sent messages have left, for at most `seconds` seconds."""
        until = time.monotonic() + seconds
        self._world.wait(lambda: self._outbox.progress() or time.monotonic() > until)
