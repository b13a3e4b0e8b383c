"""Messages from rank to rank: activations from stage to stage, and a leader's orders with the replies to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpillm.comm.counters import Count, MessageCounters
from mpillm.comm.transfer import F32, Codec, Outbox, Tag, Transfers, Wire
from mpillm.comm.world import World
from mpillm.partition.grid import Place

if TYPE_CHECKING:
    from mpi4py import MPI


class Pipe:
    """Sends activations from a shard of one stage to the same shard of the next."""

    def __init__(
        self, world: World, place: Place, wire: Wire, counters: MessageCounters, threads: int = 1
    ) -> None:
        self._world, self._place = world, place
        self._rank = place.first + place.rank
        self._codec, self._count = Codec(wire, threads), counters.pipe
        self._outbox = Outbox(world, counters.pipe)

    def send(self, x: F32) -> None:
        """Send x, f32 [m, d], to the next stage; the caller may change x afterwards."""
        assert not self._place.is_last_stage
        data = np.empty((len(x), self._codec.type.row_bytes(x.shape[1])), np.uint8)
        self._codec.encode(x, data)
        self._outbox.send(data.reshape(-1), [self._rank + self._place.shards], Tag.PIPE)

    def recv(self, m: int, d: int) -> F32:
        """Return the next f32 [m, d] from the previous stage; it belongs to the caller."""
        assert not self._place.is_first_stage
        data = np.empty((m, self._codec.type.row_bytes(d)), np.uint8)
        request = self._world.comm.Irecv(data, self._rank - self._place.shards, Tag.PIPE)
        Transfers(self._world, [request], [], [data.nbytes]).finish(self._count)
        return self._codec.decode(data, d)

    def progress(self) -> None:
        """Let MPI progress messages under way. Large messages need this now and then while this rank computes."""
        self._outbox.progress()


class Channel:
    """Carries orders from a replica's leader to its other ranks, and replies to the leader, as bytes of any length."""

    def __init__(self, world: World, counters: MessageCounters, ranks: range | None = None) -> None:
        """`ranks` are those of the replica, the leader first; all of the world if it is the only one."""
        self._world, self._counters = world, counters
        self._ranks = ranks if ranks is not None else range(world.size)
        self._orders, self._replies = Outbox(world, counters.step), Outbox(world, counters.reply)

    def post(self, order: bytes) -> None:
        """Send an order to every other rank. Only the leader calls this."""
        assert self._world.rank == self._ranks[0]
        self._orders.send(order, list(self._ranks[1:]), Tag.STEP)

    def take(self) -> bytes:
        """Return the leader's next order. Every rank but the leader calls this."""
        return self._receive(self._ranks[0], Tag.STEP, self._counters.step)

    def reply(self, answer: bytes) -> None:
        """Send an answer to the leader. Every rank but the leader calls this."""
        assert self._world.rank in self._ranks[1:]
        self._replies.send(answer, [self._ranks[0]], Tag.REPLY)

    def collect(self, source: int) -> bytes:
        """Return the next answer of the replica's rank number `source`. Only the leader calls this."""
        return self._receive(self._ranks[source], Tag.REPLY, self._counters.reply)

    def _receive(self, source: int, tag: Tag, count: Count) -> bytes:
        from mpi4py import MPI

        status = MPI.Status()
        found: list[MPI.Message] = []

        def arrived() -> bool:
            message = self._world.comm.Improbe(source, tag, status)
            if message is not None:
                found.append(message)
            return bool(found)

        count.waited(self._world.wait(arrived))
        data = bytearray(status.Get_count(MPI.BYTE))
        Transfers(self._world, [found[0].Irecv([data, MPI.BYTE])], [], [len(data)]).finish(count)
        return bytes(data)
