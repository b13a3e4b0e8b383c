"""Messages under way between ranks, and the form of activations in them.

Nothing here pickles and nothing blocks. What is sent leaves in the background from a buffer that is kept until it has
gone; what is received is checked for its size. `World.wait` waits for it and spares the cores. Messages of one kind
between two ranks keep their order, so a rank may be several steps ahead of another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from mpillm import kernels
from mpillm.comm.counters import Count
from mpillm.comm.faults import RankLost
from mpillm.comm.world import World
from mpillm.kernels import BlockType

if TYPE_CHECKING:
    from mpi4py import MPI

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Wire = Literal["q8_0", "f32"]


class WireError(RuntimeError):
    """A message is not of the size that both sides should have computed: the ranks are no longer in step."""


class Tag(IntEnum):
    """The kinds of messages; `world.UNUSED_TAG` is none of them."""

    PIPE = 2
    STEP = 3
    REPLY = 4
    REQUESTS = 5
    READY = 6
    ALL_REDUCE = 8  # the last: the pieces of a message count on from here


class Codec:
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


class SumCodec:
    """Sums of parts as bytes: float32, or for the Q8_0 wire Q8_0 blocks and then Q4_0 blocks of what those leave out.

    32 values take 52 bytes. That is much finer than the parts, so rounding a sum adds almost nothing to their errors.
    """

    def __init__(self, wire: Wire, threads: int) -> None:
        self._codec, self._rounds = Codec(wire, threads), wire == "q8_0"
        #: bytes of a block of values
        self.block_bytes = self._codec.type.block_bytes + (BlockType.Q4_0.block_bytes if self._rounds else 0)

    def encode(self, x: F32, out: U8) -> None:
        """Write f32 [k], whole blocks, to uint8 [nbytes]."""
        coarse, fine = self._halves(out)
        self._codec.encode(x[None], coarse)
        if self._rounds:
            kernels.quantize(
                BlockType.Q4_0, x[None] - self._codec.decode(coarse, len(x)), fine, self._codec.threads
            )

    def decode(self, data: U8, out: F32) -> None:
        """Write what `encode` wrote to f32 [k]."""
        coarse, fine = self._halves(data)
        out[...] = self._codec.decode(coarse, len(out))[0]
        if self._rounds:
            rest = np.empty((1, len(out)), np.float32)
            kernels.dequantize(BlockType.Q4_0, fine, len(out), rest, self._codec.threads)
            out += rest[0]

    def _halves(self, data: U8) -> tuple[U8, U8]:
        at = len(data) // self.block_bytes * self._codec.type.block_bytes
        return data[None, :at], data[None, at:]


class Outbox:
    """Messages under way. Each keeps its buffer until MPI has no more use for it."""

    def __init__(self, world: World, count: Count) -> None:
        self._world, self._count = world, count
        self._under_way: deque[tuple[list[MPI.Request], object]] = deque()
        world.keep_alive(self._under_way)

    def send(self, data: U8 | bytes, ranks: list[int], tag: Tag) -> None:
        """Send `data` to each of `ranks`; it must not change any more."""
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


class Transfers:
    """Receives of `expected` bytes, and sends, that are under way together."""

    def __init__(
        self,
        world: World,
        receives: Sequence[MPI.Request],
        sends: Sequence[MPI.Request],
        expected: Sequence[int],
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
                f"a message could not be received, {max(self._expected)} bytes were expected: {error}"
            ) from error
        for status, expected in zip(self._receives, self._expected, strict=True):
            received = status.Get_count(self._byte)
            if received != expected:
                source = status.Get_source()
                raise WireError(f"rank {source} sent {received} bytes where {expected} were expected")
            count.bytes_received += received
