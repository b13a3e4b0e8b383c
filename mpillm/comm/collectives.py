"""The ranks' messages: sums over the shards of a stage, activations between stages, orders and replies, requests.

Nothing here pickles and nothing blocks: what is sent leaves in the background from a buffer that is kept until it has
gone, and what is waited for is waited for by `World.wait`, which spares the cores. Messages of one kind between two
ranks keep their order, so a rank may be several steps ahead of another.
"""

from __future__ import annotations

import math
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mpillm import kernels
from mpillm.comm.counters import Count, MessageCounters
from mpillm.comm.faults import RankLost
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


class _Space:
    """A buffer that grows to the largest message so far and is used again for each."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, *shape: int) -> U8:
        nbytes = math.prod(shape)
        if len(self._bytes) < nbytes:
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes].reshape(shape)


class Outbox:
    """Messages under way. Each keeps its buffer until MPI has no more use for it."""

    def __init__(self, world: World, count: Count) -> None:
        self._world, self._count = world, count
        self._under_way: deque[tuple[list[MPI.Request], object]] = deque()
        world.keep_alive(self._under_way)

    def send(self, data: U8 | bytes, ranks: list[int], tag: Tag) -> None:
        from mpi4py import MPI  # here and below: planning a run loads this module, and needs no MPI

        self.progress()
        requests: list[MPI.Request] = []
        self._under_way.append((requests, data))
        requests.extend(self._world.comm.Isend([data, MPI.BYTE], rank, tag) for rank in ranks)
        self._count.sent(len(ranks), len(data))

    def progress(self) -> bool:
        """Move messages on and forget those that are gone; return whether all are."""
        from mpi4py import MPI

        while self._under_way and MPI.Request.Testall(self._under_way[0][0]):
            self._under_way.popleft()
        return not self._under_way


def _finish(world: World, requests: list[MPI.Request], expected: list[int], count: Count) -> None:
    """Wait for receives (they come first in `requests`) and sends; check the receives' sizes in bytes."""
    from mpi4py import MPI

    statuses = [MPI.Status() for _ in requests]
    try:
        count.seconds += world.wait(lambda: MPI.Request.Testall(requests, statuses))
    except (MPI.Exception, RankLost) as error:
        world.keep_alive(requests)
        if world.is_loss(error):
            raise
        raise WireError(
            f"a message could not be received, {expected} bytes were expected: {error}"
        ) from error
    for nbytes, status in zip(expected, statuses, strict=False):
        received = status.Get_count(MPI.BYTE)
        if received != nbytes:
            source = status.Get_source()
            raise WireError(f"rank {source} sent {received} bytes where {nbytes} were expected")
        count.bytes_received += received


class Group:
    """The shards of one stage, which sum what each has computed of it."""

    def __init__(
        self, world: World, place: Place, wire: Wire, counters: MessageCounters, threads: int = 1
    ) -> None:
        self._world, self._shards, self._shard = world, place.shards, place.shard
        self._first = place.first + place.stage * place.shards
        self._codec, self._count = _Codec(wire, threads), counters.all_reduce
        self._parts = _Space()

    def all_reduce(self, x: F32) -> None:
        """Replace each shard's part x, f32 [m, d], by the sum of all shards' parts; a no-op for one shard.

        Every shard gets every part as it went over the wire, its own too, and folds them in one fixed binary
        tree, ((p0 + p1) + (p2 + p3)) + ...: all end with the same bytes.
        """
        if self._shards == 1:
            return
        m, d = x.shape
        parts = self._parts.take(self._shards, m, self._codec.type.row_bytes(d))
        self._codec.encode(x, parts[self._shard])
        self._exchange(parts)
        values = self._codec.decode(parts.reshape(self._shards * m, -1), d)
        kernels.fold(values.reshape(self._shards, m, d), x, self._codec.threads)

    def all_gather(self, x: F32) -> F32:
        """Every shard's x, f32 [m, d], exactly as it is: f32 [shards, m, d]. It is valid until the next call."""
        parts = self._parts.take(self._shards, len(x), x.shape[1] * x.itemsize)
        values: F32 = parts.view(np.float32)
        values[self._shard] = x
        self._exchange(parts)
        return values

    def _exchange(self, parts: U8) -> None:
        """Send this shard's part to all others, and receive theirs, which are as large."""
        mine = parts[self._shard]
        others = [shard for shard in range(self._shards) if shard != self._shard]
        comm = self._world.comm
        requests = [comm.Irecv(parts[shard], self._first + shard, Tag.ALL_REDUCE) for shard in others]
        requests += [comm.Isend(mine, self._first + shard, Tag.ALL_REDUCE) for shard in others]
        self._count.sent(len(others), mine.nbytes)
        _finish(self._world, requests, [mine.nbytes] * len(others), self._count)


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
        _finish(self._world, [request], [data.nbytes], self._count)
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

        count.seconds += self._world.wait(arrived)
        data = bytearray(status.Get_count(MPI.BYTE))
        _finish(self._world, [found[0].Irecv([data, MPI.BYTE])], [len(data)], count)
        return bytes(data)
