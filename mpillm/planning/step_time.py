"""A model of the time of a step: pure functions of what ranks hold and of how fast they are.

A stage computes its products at the rate of their block type and number of rows, reads the keys and values of its
sequences from memory, and meanwhile reads streamed weights from its disk. Its shards then sum their rows, twice a
layer. Stages work on micro-batches in turn: with as many of them as stages all are busy, and with fewer of them each
stage waits for the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpillm.comm.parts import adders
from mpillm.kernels import BlockType
from mpillm.planning.speed import Speed

# Measured on two cores of x86-64 with AVX2: what a step takes besides products and attention.
STEP = 1e-3  # seconds: the scheduler, sampling, messages of the engine
LAYER = 50e-6  # seconds of a layer: norms, activations, the start of each kernel

WeightCounts = Mapping[BlockType, float]  # numbers of weights of matrices, by block type


@dataclass(frozen=True)
class AttentionWork:
    """Layers in which a row attends to `window` tokens at most, or to all (0)."""

    window: int
    nbytes: int  # that are read of each of those tokens
    operations: int  # for each of them


@dataclass(frozen=True)
class RankWork:
    """What one rank does in a step."""

    layers: int
    products: WeightCounts  # that every row is multiplied with
    experts: WeightCounts  # all that the rank holds; a row goes to `expert_share` of them
    head: WeightCounts  # with which only rows are multiplied of which a token is drawn
    expert_share: float
    streamed: int  # bytes of weights that a step reads from disk, of every expert if its rows need all
    streamed_experts: int  # of them: those of experts
    attention: Sequence[AttentionWork]

    def without_layers(self) -> RankWork:
        """The head alone."""
        return replace(self, layers=0, products={}, experts={}, attention=(), streamed=0, streamed_experts=0)


@dataclass(frozen=True)
class LinkRate:
    """Seconds of a message one way, and bytes/s."""

    latency: float
    wire: float


INSIDE = LinkRate(10e-6, 4e9)  # between ranks of one host, through its memory


@dataclass(frozen=True)
class Stage:
    """The ranks that share a stage's layers, and their messages."""

    works: Sequence[RankWork]
    speeds: Sequence[Speed]
    sum_bytes: float  # that all of them send to sum a row, twice a layer
    link: LinkRate  # between them
    pipe_bytes: int = 0  # of a row that goes to the next stage, from each shard to its like
    pipe: LinkRate | None = None  # to the next stage; the last one has none


@dataclass(frozen=True)
class StepRows:
    """The rows of a step: `sequences` of them draw a token; each attends to `context` tokens on average."""

    rows: float
    sequences: float
    context: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a stage's step, by what takes them; `disk` counts where it is more than all that goes on meanwhile."""

    products: float
    kv: float
    other: float
    disk: float
    messages: float
    # The part of `products` that reading the weights from memory takes, whatever is computed.
    reading: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return max(self.products + self.kv + self.other, self.disk) + self.messages

    @property
    def limit(self) -> str:
        """What takes most of it, in words."""
        computing = self.products + self.kv + self.other
        if self.messages > max(computing, self.disk):
            return "messages between ranks"
        if self.disk > computing:
            return "reading weights from disk"
        if self.kv > max(self.products, self.other):
            return "reading the KV cache"
        if self.other > self.products:
            return "what each step and layer takes besides products"
        return "reading weights from memory" if self.reading > 0.8 * self.products else "computing"


def rank_time(work: RankWork, speed: Speed, batch: StepRows) -> StepTime:
    """Seconds of a rank's part of a step, without messages."""
    share = work.expert_share
    used = 1 - (1 - share) ** batch.rows if share < 1 else 1.0  # of the experts, if choices are independent
    rows_of_expert = max(batch.rows * share / used, 1.0)
    products = sum(
        _seconds(weights, speed, rows)
        for weights, rows in (
            (work.products, batch.rows),
            ({kind: count * used for kind, count in work.experts.items()}, rows_of_expert),
            (work.head, batch.sequences),
        )
    )
    reading = sum(
        _seconds(weights, speed, 1.0) * part
        for weights, part in (
            (work.products, 1.0),
            (work.experts, used),
            (work.head, float(batch.sequences > 0)),
        )
    )
    kv = 0.0
    for layers in work.attention:
        context = min(batch.context, layers.window) if layers.window else batch.context
        # The rows of a prompt share what is read.
        read = max(batch.sequences, 1.0) * context * layers.nbytes / speed.memory
        kv += max(read, batch.rows * context * layers.operations / speed.operations(BlockType.F32, math.inf))
    streamed = work.streamed - work.streamed_experts * (1 - used)
    return StepTime(
        products=products,
        kv=kv,
        other=STEP + LAYER * work.layers,
        disk=streamed / speed.disk,
        messages=0.0,
        reading=min(reading, products),
    )


def stage_time(stage: Stage, batch: StepRows) -> StepTime:
    """Seconds of a stage: of its slowest shard, with what its shards send."""
    times = [rank_time(work, speed, batch) for work, speed in zip(stage.works, stage.speeds, strict=True)]
    slowest = max(times, key=lambda time: time.total)
    shards, messages = len(stage.works), 0.0
    if shards > 1:
        rounds = 1 if shards == 2 else 2
        nbytes = stage.sum_bytes * batch.rows / rounds
        row = stage.sum_bytes / (shards - 1) / 2  # on average of its part and of its sum
        nbytes /= shards if shards == 2 else adders(shards, row * batch.rows, stage.link.wire)
        messages += 2 * stage.works[0].layers * rounds * _message(stage.link, nbytes)
    if stage.pipe is not None:
        messages += _message(stage.pipe, len(stage.works) * batch.rows * stage.pipe_bytes)
    return replace(slowest, messages=messages)


def sum_bytes(kind: BlockType, hidden: int, shards: int) -> float:
    """Bytes that the shards of a stage send to sum one row, all together (`Group.all_reduce`).

    Two send each other theirs; of more each sends a piece of its part to each other one, and then the sum of one.
    """
    parts = kind.row_bytes(hidden)
    rest = BlockType.Q4_0.row_bytes(hidden) if kind is BlockType.Q8_0 and shards > 2 else 0
    return float((shards - 1) * (2 * parts + rest))


def between(speeds: Sequence[Speed]) -> LinkRate:
    """The link between hosts of ranks of these speeds: the slowest of theirs."""
    return LinkRate(max(speed.latency for speed in speeds), min(speed.wire for speed in speeds))


def _message(link: LinkRate, nbytes: float) -> float:
    return link.latency + nbytes / link.wire


@dataclass(frozen=True)
class Round:
    """All sequences of a replica have gone through all of its stages once."""

    seconds: float
    micro_batches: int
    slowest: int  # the number of the stage that takes longest
    stage: StepTime  # of it, for one micro-batch
    bubble: float  # the part of the time in which a stage waits for others, on average over the stages


def round_of(stages: Sequence[Stage], batch: StepRows) -> Round:
    """The fastest way of a batch through the stages: as one micro-batch, or as up to as many as there are stages."""
    maximum = max(min(len(stages), int(batch.sequences or batch.rows)), 1)
    return min((_round(stages, batch, count) for count in {1, maximum}), key=lambda made: made.seconds)


def _round(stages: Sequence[Stage], batch: StepRows, count: int) -> Round:
    part = StepRows(batch.rows / count, batch.sequences / count, batch.context)
    known = {id(stage): stage_time(stage, part) for stage in {id(stage): stage for stage in stages}.values()}
    times = [known[id(stage)] for stage in stages]
    slowest = max(range(len(times)), key=lambda number: times[number].total)
    once = sum(time.total for time in times)
    seconds = max(count * times[slowest].total, once)
    return Round(seconds, count, slowest, times[slowest], 1 - count * once / (len(times) * seconds))


def _seconds(weights: WeightCounts, speed: Speed, rows: float) -> float:
    """Return the seconds of products with so many rows; a part of a row takes as long as a whole one."""
    if rows <= 0:
        return 0.0
    rows = max(rows, 1.0)
    return sum(2 * count * rows / speed.operations(kind, rows) for kind, count in weights.items())
