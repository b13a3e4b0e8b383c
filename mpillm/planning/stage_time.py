"""A model of the time of stages: that of their ranks (`step_time`), and of the messages between these.

The shards of a stage sum their rows twice a layer. Stages work on micro-batches in turn. If there are as many
micro-batches as stages, all stages are busy. With fewer, each stage waits for the others, and a rank that waits leaves
its core to others (`Stage.alone`) and does not use up its quota of it (`Speed.part`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mpillm.comm.parts import CROWDED_ADDER, adders, lanes
from mpillm.kernels import BlockType
from mpillm.planning.speed import Speed
from mpillm.planning.step_time import RankWork, StepRows, StepTime, rank_time

# The part of the time of messages that two lanes of rows hide; it is at most this part of the computing (0.5 to 0.7
# measured on two hosts at 1 Gbit/s).
HIDDEN = 0.5


@dataclass(frozen=True)
class LinkRate:
    """The latency of a message one way in seconds, and the bandwidth in bytes/s."""

    latency: float
    wire: float


INSIDE = LinkRate(10e-6, 4e9)  # between ranks of one host, in shared memory


@dataclass(frozen=True)
class Stage:
    """The ranks of a stage, which share its layers, and their messages."""

    works: Sequence[RankWork]
    speeds: Sequence[Speed]
    sum_bytes: float  # bytes that all ranks of the stage send to sum a row, which they do twice a layer
    link: LinkRate  # between the shards
    pipe_bytes: int = 0  # bytes of a row that each shard sends to the same shard of the next stage
    pipe: LinkRate | None = None  # the link to the next stage; None for the last one
    crowded: bool = False  # ranks share cores, and a sum also waits for their turns
    # how many times as fast they are while the other stages wait, and leave them their cores
    alone: float = 1.0

    @cached_property
    def kinds(self) -> list[tuple[RankWork, Speed]]:
        """The work and the speed of each rank; ranks with the same objects appear once."""
        ranks = zip(self.works, self.speeds, strict=True)
        return list({(id(work), id(speed)): (work, speed) for work, speed in ranks}.values())


def stage_time(stage: Stage, batch: StepRows) -> StepTime:
    """Return the seconds of a stage: those of its slowest shard, and of the messages of all its shards."""
    times = [rank_time(work, speed, batch) for work, speed in stage.kinds]
    slowest = max(times, key=lambda time: time.total)
    shards, messages, latency = len(stage.works), 0.0, 0.0
    if shards > 1:
        rounds = 1 if shards == 2 else 2
        nbytes = stage.sum_bytes * batch.rows / rounds
        rows_bytes = stage.sum_bytes / (shards - 1) / 2 * batch.rows  # the average of parts and of sums
        nbytes /= shards if shards == 2 else adders(shards, rows_bytes, stage.link.wire, stage.crowded)
        count = 2 * stage.works[0].layers * rounds
        messages += count * _message(stage.link, nbytes)
        if stage.crowded:
            messages += 2 * stage.works[0].layers * (shards - 1) * CROWDED_ADDER
        latency += count * stage.link.latency
        if lanes(shards, int(batch.rows), rows_bytes, stage.link.wire) > 1 and stage.works[0].stacked:
            messages -= HIDDEN * min(messages, slowest.total)
    if stage.pipe is not None:
        messages += _message(stage.pipe, len(stage.works) * batch.rows * stage.pipe_bytes)
        latency += stage.pipe.latency
    part = min(speed.part for _, speed in stage.kinds)
    return replace(slowest, messages=messages, polling=latency * (1 / part - 1), alone=stage.alone)


def sum_bytes(kind: BlockType, hidden: int, shards: int) -> float:
    """Return the bytes that all shards of a stage together send to sum one row (`Group.all_reduce`).

    Two shards send each other their parts. Of more shards, each sends a piece of its part to each other shard, and then
    the sum of its own piece.
    """
    parts = kind.row_bytes(hidden)
    rest = BlockType.Q4_0.row_bytes(hidden) if kind is BlockType.Q8_0 and shards > 2 else 0
    return float((shards - 1) * (2 * parts + rest))


def between(speeds: Sequence[Speed]) -> LinkRate:
    """Return the slowest link between the hosts of ranks with these speeds."""
    return LinkRate(max(speed.latency for speed in speeds), min(speed.wire for speed in speeds))


def _message(link: LinkRate, nbytes: float) -> float:
    return link.latency + nbytes / link.wire


@dataclass(frozen=True)
class Round:
    """A round: all sequences of a replica go through all of its stages once."""

    seconds: float
    micro_batches: int
    slowest: int  # the number of the slowest stage
    stage: StepTime  # the time of the slowest stage for one micro-batch
    bubble: float  # the part of the time in which a stage waits for others, the average of all stages


def round_of(stages: Sequence[Stage], batch: StepRows) -> Round:
    """Return the fastest round of a batch: as one micro-batch, or as many micro-batches as there are stages."""
    maximum = max(min(len(stages), int(batch.sequences or batch.rows)), 1)
    return min((_round(stages, batch, count) for count in {1, maximum}), key=lambda made: made.seconds)


def _round(stages: Sequence[Stage], batch: StepRows, count: int) -> Round:
    part = StepRows(batch.rows / count, batch.sequences / count, batch.context, batch.scored / count)
    known = {id(stage): stage_time(stage, part) for stage in {id(stage): stage for stage in stages}.values()}
    times = [known[id(stage)] for stage in stages]
    slowest = max(range(len(times)), key=lambda number: times[number].total)
    once = sum(time.rested for time in times)
    seconds = max(count * times[slowest].total, once)
    return Round(seconds, count, slowest, times[slowest], 1 - count * once / (len(times) * seconds))
