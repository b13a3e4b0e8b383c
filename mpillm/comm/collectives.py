"""All-reduce and all-gather over the shards of a stage.

The shards of one host sum in memory that they share (see `shared`); all others exchange messages (see `transfer`).
"""

from __future__ import annotations

import numpy as np

from mpillm import kernels
from mpillm.comm.counters import Count, MessageCounters
from mpillm.comm.shared import SharedRows
from mpillm.comm.transfer import F32, Codec, Tag, Transfers, Wire, WireError
from mpillm.comm.world import World
from mpillm.partition.grid import Place


class _Parts:
    """A part of each shard of a stage, uint8 [shards, m, nbytes], and the messages that bring the others' here.

    The messages are persistent: a step has two exchanges for each layer, nearly always of one size.
    """

    def __init__(self, world: World, first: int, place: Place, m: int, nbytes: int) -> None:
        """`first` is the rank of the stage's first shard."""
        from mpi4py import MPI

        self.data = np.empty((place.shards, m, nbytes), np.uint8)
        self.own = self.data[place.shard]
        self._others = [shard for shard in range(place.shards) if shard != place.shard]
        comm, tag = world.comm, Tag.ALL_REDUCE
        receives = [comm.Recv_init(self.data[shard], first + shard, tag) for shard in self._others]
        sends = [comm.Send_init(self.own, first + shard, tag) for shard in self._others]
        self._requests, self._start = [*receives, *sends], MPI.Prequest.Startall
        self._messages = Transfers(world, receives, sends, self.own.nbytes)

    def exchange(self, count: Count) -> None:
        """Send `own` to all other shards, and receive theirs."""
        self._start(self._requests)
        count.sent(len(self._others), self.own.nbytes)
        self._messages.finish(count)

    def free(self) -> None:
        """Give the messages back to MPI; the last exchange has ended."""
        for request in self._requests:
            request.Free()


class Group:
    """The shards of one stage, which sum what each has computed of it."""

    def __init__(
        self,
        world: World,
        place: Place,
        wire: Wire,
        counters: MessageCounters,
        threads: int = 1,
        shared: SharedRows | None = None,
    ) -> None:
        """`shared`, where the shards have such memory, takes the place of messages if the wire is f32."""
        self._world, self._place = world, place
        self._first = place.first + place.stage * place.shards
        self._codec, self._count = Codec(wire, threads), counters.all_reduce
        self._shared = shared if wire == "f32" else None
        self._parts: dict[str, _Parts] = {}  # of the last call of each method
        self._others = [self._first + shard for shard in range(place.shards) if shard != place.shard]

    def all_reduce(self, x: F32) -> None:
        """Replace each shard's part x, f32 [m, d], by the sum of all shards' parts; a no-op for one shard.

        Every shard gets every part as it went over the wire, its own too, and folds them in one fixed binary
        tree, ((p0 + p1) + (p2 + p3)) + ...: all end with the same bytes.
        """
        shards = self._place.shards
        if shards == 1:
            return
        m, d = x.shape
        if self._shared is not None and d <= self._shared.capacity:
            self._sum_in_shared_memory(self._shared, x)
            return
        parts = self._parts_of("all_reduce", m, self._codec.type.row_bytes(d))
        self._codec.encode(x, parts.own)
        parts.exchange(self._count)
        values = self._codec.decode(parts.data.reshape(shards * m, -1), d)
        kernels.fold(values.reshape(shards, m, d), x, self._codec.threads)

    def _sum_in_shared_memory(self, shared: SharedRows, x: F32) -> None:
        """`all_reduce` by pieces of as many rows as the memory takes."""
        place, count, d = self._place, self._count, x.shape[1]
        rows = shared.capacity // d
        for begin in range(0, len(x), rows):
            piece = x[begin : begin + rows]
            parts = shared.slot(len(piece), d)
            parts[place.shard] = piece
            shared.publish(piece.nbytes)
            count.waited(self._world.wait_for_flags(shared.wait, self._others))
            if (unlike := shared.unlike()) is not None:
                shard, received = unlike
                raise WireError(
                    f"rank {self._first + shard} sent {received} bytes where {piece.nbytes} were expected"
                )
            count.sent(place.shards - 1, piece.nbytes)
            count.bytes_received += (place.shards - 1) * piece.nbytes
            kernels.fold(parts, piece, self._codec.threads)

    def all_gather(self, x: F32) -> F32:
        """Every shard's x, f32 [m, d], exactly as it is: f32 [shards, m, d]. It is valid until the next call."""
        parts = self._parts_of("all_gather", len(x), x.shape[1] * x.itemsize)
        values: F32 = parts.data.view(np.float32)
        values[self._place.shard] = x
        parts.exchange(self._count)
        return values

    def _parts_of(self, method: str, m: int, nbytes: int) -> _Parts:
        """Room for parts of m rows, and their messages: those of the method's last call if they are as large."""
        parts = self._parts.get(method)
        if parts is None or parts.own.shape != (m, nbytes):
            if parts is not None:
                parts.free()
                del self._parts[method], parts
            parts = self._parts[method] = _Parts(self._world, self._first, self._place, m, nbytes)
        return parts
