"""The ranks' messages: sums over the shards of a stage, activations between stages, orders and replies, requests.

The shards of one host sum in memory that they share (see `shared`), all else travels as messages. Nothing here pickles
and nothing blocks: what is sent leaves in the background from a buffer that is kept until it has
gone, and what is waited for is waited for by `World.wait`, which spares the cores. Messages of one kind between two
ranks keep their order, so a rank may be several steps ahead of another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mpillm import kernels
from mpillm.comm.counters import Count, MessageCounters
from mpillm.comm.faults import RankLost
from mpillm.comm.shared import SharedRows
from mpillm.comm.world import World
from mpillm.kernels import BlockType
from mpillm.partition.grid import Place

if TYPE_CHECKING:
    from mpi4py import MPI

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Wire = Literal["q8_0", "f32"]


class WireError(RuntimeError):
    """A message is not of the size that both sides should have computed: the ranks are no longer in step."""


class Tag(IntEnum):
    ALL_REDUCE = 1
    PIPE = 2
    STEP = 3
    REPLY = 4
    REQUESTS = 5


class _Codec:
    """Activations as bytes: float32, or Q8_0 blocks of 34 bytes for 32 values."""

    def __init__(self, wire: Wire, threads: int) -> None:
        self.type = {"q8_0": BlockType.Q8_0, "f32": BlockType.F32}[wire]
        self.threads = threads

    def encode(self, x: F32, out: U8) -> None:
        """Write f32 [m, d] to uint8 [m, row_bytes(d)]."""
        if self.type is BlockType.F32:
            out.view(np.float32)[...] = x
        else:
            kernels.quantize(self.type, x, out, self.threads)

    def decode(self, data: U8, d: int) -> F32:
        """Return what `encode` wrote as f32 [m, d]; for the f32 wire this is a view of `data`."""
        if self.type is BlockType.F32:
            return data.view(np.float32)
        x = np.empty((len(data), d), np.float32)
        kernels.dequantize(self.type, data, d, x, self.threads)
        return x


class Outbox:
    """Messages under way. Each keeps its buffer until MPI has no more use for it."""

    def __init__(self, world: World, count: Count) -> None:
        self._world, self._count = world, count
        self._under_way: deque[tuple[list[MPI.Request], object]] = deque()
        world.keep_alive(self._under_way)

    def send(self, data: U8 | bytes, ranks: list[int], tag: Tag) -> None:
        from mpi4py import MPI

        self.progress()
        requests: list[MPI.Request] = []
        self._under_way.append((requests, data))
        requests.extend(self._world.comm.Isend([data, MPI.BYTE], rank, tag) for rank in ranks)
        self._count.sent(len(ranks), len(data))

    def progress(self) -> bool:
        """Move messages on and forget those that are gone; return whether all are."""
        if self._under_way:  # nearly never, and an import costs more than this
            from mpi4py import MPI

            while self._under_way and MPI.Request.Testall(self._under_way[0][0]):
                self._under_way.popleft()
        return not self._under_way


class _Messages:
    """Receives of `expected` bytes each, and sends, that are under way together."""

    def __init__(
        self, world: World, receives: Sequence[MPI.Request], sends: Sequence[MPI.Request], expected: int
    ) -> None:
        from mpi4py import MPI  # here and below: planning a run loads this module, and needs no MPI

        self._world, self._requests, self._expected = world, [*receives, *sends], expected
        self._statuses = [MPI.Status() for _ in self._requests]
        self._receives = self._statuses[: len(receives)]
        # Names of MPI are looked up once: where caches are cold, an import costs as much as a call.
        self._test, self._byte = MPI.Request.Testall, MPI.BYTE

    def finish(self, count: Count) -> None:
        """Wait for all of them, and check the receives' sizes."""
        try:
            count.waited(self._world.wait(lambda: self._test(self._requests, self._statuses)))
        except Exception as error:
            from mpi4py import MPI

            self._world.keep_alive(self._requests)
            if self._world.is_loss(error) or not isinstance(error, (MPI.Exception, RankLost)):
                raise
            raise WireError(
                f"a message could not be received, {self._expected} bytes were expected: {error}"
            ) from error
        for status in self._receives:
            received = status.Get_count(self._byte)
            if received != self._expected:
                source = status.Get_source()
                raise WireError(f"rank {source} sent {received} bytes where {self._expected} were expected")
            count.bytes_received += received


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
        self._messages = _Messages(world, receives, sends, self.own.nbytes)

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
        self._codec, self._count = _Codec(wire, threads), counters.all_reduce
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
            count.waited(self._world.wait_shared(shared.wait, self._others))
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


class Pipe:
    """Activations from a shard of one stage to the same shard of the next."""

    def __init__(
        self, world: World, place: Place, wire: Wire, counters: MessageCounters, threads: int = 1
    ) -> None:
        self._world, self._place = world, place
        self._rank = place.first + place.rank
        self._codec, self._count = _Codec(wire, threads), counters.pipe
        self._outbox = Outbox(world, counters.pipe)

    def send(self, x: F32) -> None:
        """Send f32 [m, d] to the next stage; x may be changed at once."""
        assert not self._place.is_last_stage
        data = np.empty((len(x), self._codec.type.row_bytes(x.shape[1])), np.uint8)
        self._codec.encode(x, data)
        self._outbox.send(data.reshape(-1), [self._rank + self._place.shards], Tag.PIPE)

    def recv(self, m: int, d: int) -> F32:
        """Return the f32 [m, d] that the previous stage sent next; it belongs to the caller."""
        assert not self._place.is_first_stage
        data = np.empty((m, self._codec.type.row_bytes(d)), np.uint8)
        request = self._world.comm.Irecv(data, self._rank - self._place.shards, Tag.PIPE)
        _Messages(self._world, [request], [], data.nbytes).finish(self._count)
        return self._codec.decode(data, d)

    def progress(self) -> None:
        """Move what is under way on. Large messages need it now and then while this rank computes."""
        self._outbox.progress()


class Channel:
    """Orders from a replica's leader to its other ranks, and replies to the leader, as bytes of any length."""

    def __init__(self, world: World, counters: MessageCounters, ranks: range | None = None) -> None:
        """`ranks` are those of the replica, the leader first; all of the world if it is the only one."""
        self._world, self._counters = world, counters
        self._ranks = ranks if ranks is not None else range(world.size)
        self._orders, self._replies = Outbox(world, counters.step), Outbox(world, counters.reply)

    def post(self, order: bytes) -> None:
        """The leader: send an order to every other rank."""
        assert self._world.rank == self._ranks[0]
        self._orders.send(order, list(self._ranks[1:]), Tag.STEP)

    def take(self) -> bytes:
        """Every other rank: return the next order."""
        return self._receive(self._ranks[0], Tag.STEP, self._counters.step)

    def reply(self, answer: bytes) -> None:
        """Every other rank: send an answer to the leader."""
        assert self._world.rank in self._ranks[1:]
        self._replies.send(answer, [self._ranks[0]], Tag.REPLY)

    def collect(self, source: int) -> bytes:
        """The leader: return the next answer of the replica's rank number `source`."""
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
        _Messages(self._world, [found[0].Irecv([data, MPI.BYTE])], [], len(data)).finish(count)
        return bytes(data)
