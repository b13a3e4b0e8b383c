"""The messages that carry the parts of a stage's shards. They are persistent: a step has two exchanges for each
layer, nearly always of one size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpillm.comm.counters import Count
from mpillm.comm.transfer import U8, Tag, Transfers
from mpillm.comm.world import World
from mpillm.partition.grid import Place

if TYPE_CHECKING:
    from mpi4py import MPI

# Seconds that one more shard that sums takes of each of them: two messages to it and two from it over TCP. The second
# is of ranks that share cores, four on two: they also wait for each other's turns.
ADDER, CROWDED_ADDER = 25e-6, 125e-6
# Bytes of a message that travels while its receiver computes: below the limit (64 KiB of Open MPI over TCP) from which
# sender and receiver first agree, for which both must be in MPI.
EAGER = 60_000
# Seconds on the wire and rows from which there are two lanes: with 1.1B weights on two hosts 16 rows of 1.05 ms became
# 1.17 times as fast, 64 of 1.1 ms 1.13 times, 32 of 0.56 ms no faster.
LANES, LANE_ROWS = 0.8e-3, 16


class _Messages:
    """One message to each of the other shards, and one from each of them."""

    def __init__(
        self, world: World, ranks: Sequence[int], receives: Sequence[U8], sends: Sequence[U8]
    ) -> None:
        """With each of `ranks`: what comes from it, uint8 [nbytes], and what goes to it; none if that is empty."""
        from mpi4py import MPI

        comm, tag = world.comm, Tag.ALL_REDUCE
        # MPI may start requests in any order: a tag for each piece tells those of one rank apart.
        inward, outward = (
            [
                (piece, rank, tag + number)
                for data, rank in zip(of, ranks, strict=True)
                for number, piece in enumerate(_eager(data.reshape(-1)))
            ]
            for of in (receives, sends)
        )
        coming = [comm.Recv_init(*one) for one in inward]
        going = [comm.Send_init(*one) for one in outward]
        self._requests: list[MPI.Prequest] = [*coming, *going]
        self._start = MPI.Prequest.Startall
        self._sent = [data.nbytes for data, *_ in outward]
        self._transfers = Transfers(world, coming, going, [data.nbytes for data, *_ in inward])

    def begin(self, count: Count) -> None:
        """Start all messages."""
        self._start(self._requests)
        for nbytes in self._sent:
            count.sent(1, nbytes)

    def end(self, count: Count) -> None:
        """Wait until all messages have been sent and received."""
        self._transfers.finish(count)

    def free(self) -> None:
        """Give the messages back to MPI; the last exchange has ended."""
        for request in self._requests:
            request.Free()


class Copies:
    """A part of each shard, uint8 [shards, m, nbytes], and the messages that bring all of them to every shard."""

    def __init__(self, world: World, first: int, place: Place, m: int, nbytes: int) -> None:
        """`first` is the rank of the stage's first shard."""
        self.data = np.empty((place.shards, m, nbytes), np.uint8)
        self.own = self.data[place.shard]
        others = _others(place)
        ranks = [first + shard for shard in others]
        receives, sends = [self.data[shard] for shard in others], [self.own] * len(others)
        self._messages = _Messages(world, ranks, receives, sends)

    def begin(self, count: Count) -> None:
        """Send `own` to all other shards, and receive theirs."""
        self._messages.begin(count)

    def end(self, count: Count) -> None:
        """Wait until all parts are here."""
        self._messages.end(count)

    def free(self) -> None:
        """Give the messages back to MPI; the last exchange has ended."""
        self._messages.free()


class Pieces:
    """A reduce-scatter and an all-gather of rows: each of the first shards (`adders`) sums one piece of them.

    All together send 2 (shards - 1) times the rows, where copies of each part to all others are shards times that / 2.
    """

    def __init__(
        self,
        world: World,
        first: int,
        place: Place,
        blocks: int,
        part_bytes: int,
        sum_bytes: int,
        rate: float,
        crowded: bool,
    ) -> None:
        """All rows together have `blocks` blocks; a block takes `part_bytes` as a part, and `sum_bytes` as a sum.

        `first` is the rank of the stage's first shard; `rate` and `crowded` are those of `adders`.
        """
        count = adders(place.shards, blocks * (part_bytes + sum_bytes) / 2, rate, crowded)
        #: the pieces' first blocks, and the end
        self.bounds = [min(shard, count) * blocks // count for shard in range(place.shards + 1)]
        self.parts = np.empty(blocks * part_bytes, np.uint8)
        parts, sums = (
            [data[begin * size : end * size] for begin, end in itertools.pairwise(self.bounds)]
            for data, size in ((self.parts, part_bytes), (np.empty(blocks * sum_bytes, np.uint8), sum_bytes))
        )
        self.sums, self._own, self._sum = sums, parts[place.shard], sums[place.shard]
        self._received = np.empty((place.shards, self._own.nbytes), np.uint8)
        self._scattering = False  # whether parts are under way
        self._shard, others = place.shard, _others(place)
        ranks = [first + shard for shard in others]
        receives, sends = ([of[shard] for shard in others] for of in (self._received, parts))
        self._scatter = _Messages(world, ranks, receives, sends)
        self._gather = _Messages(world, ranks, [sums[shard] for shard in others], [self._sum] * len(others))

    def begin(self, count: Count) -> None:
        """Send this shard's part of all pieces to those that sum them."""
        self._scattering = True
        self._scatter.begin(count)

    def turn(self, fold: Callable[[U8, U8], None], count: Count) -> None:
        """Wait for the other shards' parts of this shard's piece, sum them, and send them the sum; once per exchange.

        `fold` writes the sum of parts, uint8 [shards, nbytes], to its second argument.
        """
        if self._scattering:
            self._received[self._shard] = self._own
            self._scatter.end(count)
            self._scattering = False
            if self._own.nbytes:
                fold(self._received, self._sum)
            self._gather.begin(count)

    def end(self, fold: Callable[[U8, U8], None], count: Count) -> None:
        """Take the last turn, and wait until `sums` has a piece of each shard."""
        self.turn(fold, count)
        self._gather.end(count)

    def free(self) -> None:
        """Give the messages back to MPI; the last exchange has ended."""
        self._scatter.free()
        self._gather.free()


def adders(shards: int, nbytes: float, rate: float, crowded: bool = False) -> int:
    """Return how many of more than two shards sum a piece of the rows, of `nbytes`; a wire carries `rate` bytes/s.

    Each of them takes in and sends shards - 1 times its piece, so that more of them need their wires for less time, but
    exchange more messages: for few rows one shard sums alone. `crowded`: ranks share cores.
    """
    on_the_wire = 2 * (shards - 1) * nbytes / rate
    return min(max(int(math.sqrt(on_the_wire / (CROWDED_ADDER if crowded else ADDER))), 1), shards)


def lanes(shards: int, m: int, nbytes: float, rate: float) -> int:
    """Return the number of lanes for m rows of `nbytes`: two if one lane travels while the other is computed.

    Weights are read once more for each lane, and products of fewer rows are slower: on a wire that is done sooner than
    this (`LANES`) nothing is gained.
    """
    on_the_wire = 2 * (shards - 1) * nbytes / shards / rate
    return 2 if m >= LANE_ROWS and on_the_wire >= LANES else 1


def _eager(data: U8) -> list[U8]:
    """Return bytes in pieces that MPI sends without asking the receiver first."""
    return [data[at : at + EAGER] for at in range(0, len(data), EAGER)]


def _others(place: Place) -> list[int]:
    return [shard for shard in range(place.shards) if shard != place.shard]
