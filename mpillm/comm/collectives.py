"""All-reduce and all-gather over the shards of a stage.

The shards of one host sum in memory that they share (see `shared`); all others exchange messages (see `parts`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np

from mpillm import kernels
from mpillm.comm.counters import MessageCounters
from mpillm.comm.parts import Copies, Pieces, lanes
from mpillm.comm.shared import SharedRows
from mpillm.comm.transfer import F32, U8, Codec, SumCodec, Wire, WireError
from mpillm.comm.world import World
from mpillm.partition.grid import Place


class Group:
    """The shards of one stage and their collective operations."""

    def __init__(
        self,
        world: World,
        place: Place,
        wire: Wire,
        counters: MessageCounters,
        threads: int = 1,
        shared: SharedRows | None = None,
        rate: float = math.inf,
        crowded: bool = False,
        whole: bool = False,
    ) -> None:
        """`shared`, where the shards have such memory, takes the place of messages if the wire is f32.

        `rate` is that of the network between them in bytes/s, and `crowded` says that some of them share cores; all
        must know the same. With `whole` all rows are in one lane.
        """
        self._world, self._place = world, place
        self._first = place.first + place.stage * place.shards
        self._codec, self._sums = Codec(wire, threads), SumCodec(wire, threads)
        self._count = counters.all_reduce
        self._rate, self._crowded, self._whole = rate, crowded, whole
        self._shared = shared if wire == "f32" else None
        # Of the last call of each method, the latter of each lane.
        self._gathered: dict[int, Copies] = {}
        self._copies: dict[int, Copies] = {}
        self._pieces: dict[int, Pieces] = {}
        self._others = [self._first + shard for shard in range(place.shards) if shard != place.shard]
        self._under_way: dict[int, Copies | Pieces] = {}  # sums of lanes
        world.keep_alive(self._under_way)

    def all_reduce(self, x: F32) -> None:
        """Replace each shard's part x, f32 [m, d], by the sum of all shards' parts; a no-op for one shard.

        Parts are folded in one fixed binary tree, ((p0 + p1) + (p2 + p3)) + ..., each as it went over the wire, the
        own one too. Of more than two shards each, or for few rows some (`parts.adders`), sums a piece of the rows, and
        sends it to the others (`SumCodec`).
        All end with the same bytes. Rows are summed in lanes here too: other shards may compute between their lanes,
        and messages must have one size on all.
        """
        if self._place.shards == 1:
            return
        bounds = itertools.pairwise(self.lanes(*x.shape))
        ends = [self.begin(x[first:end], lane) for lane, (first, end) in enumerate(bounds)]
        for end in ends:
            end()

    def begin(self, x: F32, lane: int = 0) -> Callable[[], None]:
        """Begin `all_reduce` of several shards and return a function that ends it. Do not use x before that.

        Each lane, numbered from 0, may have one under way. They end in the order in which they began.
        """
        shards = self._place.shards
        m, d = x.shape
        if self._shared is not None and d <= self._shared.capacity:
            self._sum_in_shared_memory(self._shared, x)
            return _nothing
        row_bytes = self._codec.type.row_bytes(d)
        if shards == 2:
            copies = self._copies_of(self._copies, lane, m, row_bytes)
            self._codec.encode(x, copies.own)
            self._under_way[lane] = copies
            copies.begin(self._count)
            return partial(self._end_copies, copies, x, lane)
        pieces = self._pieces_of(lane, m * row_bytes // self._codec.type.block_bytes)
        self._codec.encode(x, pieces.parts.reshape(m, -1))
        for other in self._pieces.values():  # what is sent first leaves first
            other.turn(self._fold_piece, self._count)
        self._under_way[lane] = pieces
        pieces.begin(self._count)
        return partial(self._end_pieces, pieces, x, lane)

    def lanes(self, m: int, d: int) -> list[int]:
        """Return the first row of each lane in which rows [m, d] are summed fastest, followed by m."""
        kind, shards = self._codec.type, self._place.shards
        of_sums = self._sums.block_bytes if shards > 2 else kind.block_bytes
        nbytes = m * kind.row_bytes(d) * (1 + of_sums / kind.block_bytes) / 2
        one = self._whole or self._shared is not None
        count = 1 if one else lanes(shards, m, nbytes, self._rate)
        return [lane * m // count for lane in range(count + 1)]

    def _end_copies(self, copies: Copies, x: F32, lane: int) -> None:
        copies.end(self._count)
        del self._under_way[lane]
        (m, d), shards = x.shape, self._place.shards
        values = self._codec.decode(copies.data.reshape(shards * m, -1), d)
        kernels.fold(values.reshape(shards, m, d), x, self._codec.threads)

    def _end_pieces(self, pieces: Pieces, x: F32, lane: int) -> None:
        kind, (m, d) = self._codec.type, x.shape
        pieces.end(self._fold_piece, self._count)
        del self._under_way[lane]
        values = np.empty(pieces.bounds[-1] * kind.block, np.float32)
        for data, (begin, end) in zip(pieces.sums, itertools.pairwise(pieces.bounds), strict=True):
            if end > begin:
                self._sums.decode(data, values[begin * kind.block : end * kind.block])
        x[...] = values.reshape(m, -1)[:, :d]

    def _pieces_of(self, lane: int, blocks: int) -> Pieces:
        """Return buffers and messages for `blocks` blocks; the lane's previous ones if they have that size."""
        pieces = self._pieces.get(lane)
        if pieces is None or pieces.bounds[-1] != blocks:
            if pieces is not None:
                del self._pieces[lane]
                pieces.free()
            sizes = self._codec.type.block_bytes, self._sums.block_bytes
            pieces = self._pieces[lane] = Pieces(
                self._world, self._first, self._place, blocks, *sizes, self._rate, self._crowded
            )
        return pieces

    def _fold_piece(self, parts: U8, out: U8) -> None:
        """Write the sum of each shard's blocks of a piece, uint8 [shards, nbytes], to uint8 [nbytes]."""
        kind = self._codec.type
        values = self._codec.decode(parts, parts.shape[1] // kind.block_bytes * kind.block)[:, None]
        total = np.empty(values.shape[1:], np.float32)
        kernels.fold(values, total, self._codec.threads)
        self._sums.encode(total[0], out)

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
        """Return every shard's x, f32 [m, d], without rounding: f32 [shards, m, d], valid until the next call."""
        copies = self._copies_of(self._gathered, 0, len(x), x.shape[1] * x.itemsize)
        values: F32 = copies.data.view(np.float32)
        values[self._place.shard] = x
        copies.begin(self._count)
        copies.end(self._count)
        return values

    def _copies_of(self, known: dict[int, Copies], lane: int, m: int, nbytes: int) -> Copies:
        """Return buffers and messages for parts of `m` rows; the lane's previous ones if they have that size."""
        copies = known.get(lane)
        if copies is None or copies.own.shape != (m, nbytes):
            if copies is not None:
                copies.free()
                del known[lane], copies
            copies = known[lane] = Copies(self._world, self._first, self._place, m, nbytes)
        return copies


def _nothing() -> None:
    """The end of a sum that needs no messages."""
