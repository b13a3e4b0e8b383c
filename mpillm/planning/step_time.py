"""A model of the time of a rank's part of a step: pure functions of its weights and its speed.

A rank computes products at the rate of their block type and number of rows. It applies norms, activation functions and
quantisation to the values that products read and write, and computes attention over the keys and values of its
sequences. At the same time it reads streamed weights from its disk. `stage_time` adds the messages between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpillm.kernels import KV_BLOCK, BlockType
from mpillm.planning.speed import LARGE, SMALL, WIDTH, Speed

# Seconds outside of the kernels, measured with SmolLM2-135M on a core of Zen 5 (`Speed.core` is 1). They are twice as
# long as without kernels, which evict Python's data from the caches.
STEP = 400e-6  # for a step: the scheduler, messages of the engine
DRAWN = 60e-6  # for a token that is drawn or scored: its candidates, its text, its stop conditions
LAYER = 20e-6  # for a layer: the start of its kernels
WAIT = 10e-6  # for a layer, times the square root of the rows: threads wait for the last after each kernel
APART = 120e-6  # for a layer whose kernels are called one by one, in addition to LAYER
LOAD = 50e-6  # for a page of weights that is loaded
# Products are measured with matrices of WIDTH columns. Narrower matrices read and write more values for each operation.
# Each of those values takes NARROW times as long as a value in a norm. With 576 columns 1.7 was measured for 32 rows,
# and 1.2 for whole jobs with up to 512 rows, which read W less often than the 64 rows of the measurement.
NARROW = 1.2
# Seconds for a byte of streamed weights, which the cores that compute also read and convert (0.2 to 0.3e-9 measured
# with SmolLM2 and a Llama of 10^9 weights, packed and not).
STREAMED = 0.25e-9
# Of computing and reading, the part of the shorter one that does not overlap with the longer one if every page is
# streamed: two buffers cannot hold a page in use and two that are being read.
ONE_BY_ONE = 0.25
# The usual period of a quota (cpu.max), in seconds. A rank that has waited for others runs as fast as on a whole core
# until it has used its part of a period.
PERIOD = 0.1
WeightCounts = Mapping[BlockType, float]  # for each block type, the number of weights of matrices


@dataclass(frozen=True)
class AttentionWork:
    """Layers in which a row attends to at most `window` tokens (0: to all)."""

    window: int
    nbytes: int  # bytes that are read for each of those tokens
    operations: int  # operations for each of those tokens and each row


@dataclass(frozen=True)
class RankWork:
    """The work of one rank in a step."""

    layers: int
    products: WeightCounts  # the weights that every row is multiplied with
    experts: WeightCounts  # all experts of the rank; a row goes to `expert_share` of them
    head: WeightCounts  # the LM head, for rows with logits
    expert_share: float
    streamed: int  # bytes of weights that a step reads from disk if its rows need all experts
    streamed_experts: int  # the part of `streamed` that is experts
    attention: Sequence[AttentionWork]
    values: float = 0.0  # values of a row that products read and write
    experts_values: float = 0.0  # values that the products of all experts read and write
    head_values: float = 0.0  # values that the product of the LM head reads and writes
    page: float = 0.0  # average bytes of a page
    made: int = 0  # bytes of weights that are packed in memory before the first step; others are mapped
    apart: bool = False  # the layers' kernels are called one by one
    streamed_part: float = 0.0  # the part of the pages that is streamed, if they are used one after the other
    stacked: bool = True  # one kernel call computes all layers, and rows may be computed in lanes

    def without_layers(self) -> RankWork:
        """Return the same rank with the LM head alone."""
        return replace(self, layers=0, products={}, experts={}, attention=(), streamed=0, streamed_experts=0,
                       streamed_part=0.0, values=0.0, experts_values=0.0)  # fmt: skip


@dataclass(frozen=True)
class StepRows:
    """The rows of a step, each of which attends to `context` tokens on average.

    `sequences` of them draw a token. `scored` more rows, of prompts, have logits too.
    """

    rows: float
    sequences: float
    context: float
    scored: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """The seconds of a stage's step, by cause. Reading from `disk` overlaps with computing, except a part (`apart`)."""

    products: float
    kv: float
    other: float
    disk: float
    messages: float
    reading: float = 0.0  # the seconds of `products` in which weights are read from memory
    apart: float = 0.0  # of computing and `disk`, the part of the shorter one that does not overlap
    part: float = 1.0  # `Speed.part` of the ranks
    polling: float = 0.0  # the seconds that polling for messages adds, because it uses up the quota
    alone: float = 1.0  # how many times as fast the ranks compute while those that share their cores wait

    @property
    def total(self) -> float:
        """The seconds of the step if the ranks always have something to do."""
        return self._with(self.products + self.kv + self.other) + self.messages + self.polling

    @property
    def rested(self) -> float:
        """The seconds of the step if the ranks have waited without using up their quota, and all others wait now."""
        running = self.part * (self.products + self.kv + self.other) / self.alone
        stops = int(running / (self.part * PERIOD))
        return self._with(running + stops * (1 - self.part) * PERIOD) + self.messages

    def _with(self, computing: float) -> float:
        return max(computing, self.disk) + self.apart * min(computing, self.disk)

    @property
    def limit(self) -> str:
        """The cause that takes most of the time, in words."""
        computing = self.products + self.kv + self.other
        if self.messages + self.polling > max(computing, self.disk):
            return "messages between ranks"
        if self.disk > computing:
            return "reading weights from disk"
        if self.kv > max(self.products, self.other):
            return "reading the KV cache"
        if self.other > self.products:
            return "what each step and layer takes besides products"
        return "reading weights from memory" if self.reading > 0.8 * self.products else "computing"


def rank_time(work: RankWork, speed: Speed, batch: StepRows) -> StepTime:
    """Return the seconds of a rank's part of a step, without messages."""
    share, with_logits = work.expert_share, batch.sequences + batch.scored
    used = 1 - (1 - share) ** batch.rows if share < 1 else 1.0  # of the experts, if choices are independent
    rows_of_expert = max(batch.rows * share / used, 1.0)
    products = sum(
        _seconds(weights, speed, rows)
        for weights, rows in (
            (work.products, batch.rows),
            ({kind: count * used for kind, count in work.experts.items()}, rows_of_expert),
            (work.head, with_logits),
        )
    )
    reading = sum(
        _seconds(weights, speed, 1.0) * part
        for weights, part in (
            (work.products, 1.0),
            (work.experts, used),
            (work.head, float(with_logits > 0)),
        )
    )
    kv, each = 0.0, batch.rows / max(batch.sequences, 1.0)  # rows of a sequence
    rate = speed.attention[1] if each > KV_BLOCK else speed.attention[0]
    for layers in work.attention:
        context = min(batch.context, layers.window) if layers.window else batch.context
        # Blocks are read and computed whole; the rows of a prompt share the blocks that are read.
        read = max(batch.sequences, 1.0) * (context + KV_BLOCK / 2) * layers.nbytes / speed.memory
        kv += read + batch.rows * (context + KV_BLOCK) * layers.operations / rate
    values = (
        batch.rows * _values(work.products, work.values)
        + batch.rows * share * _values(work.experts, work.experts_values)
        + with_logits * _values(work.head, work.head_values)
    )
    streamed = work.streamed - work.streamed_experts * (1 - used)
    loads = streamed / work.page if work.page else 0.0
    layer = LAYER + WAIT * math.sqrt(batch.rows) + APART * work.apart
    other = STEP + DRAWN * with_logits + layer * work.layers + LOAD * loads + STREAMED * streamed
    return StepTime(
        products=products,
        kv=kv,
        other=other / speed.core + values / speed.values,
        disk=streamed / disk_rate(speed, work.page),
        messages=0.0,
        reading=min(reading, products),
        apart=ONE_BY_ONE * work.streamed_part**2,
        part=speed.part,
    )


def disk_rate(speed: Speed, page: float) -> float:
    """Bytes/s for reading pages of `page` bytes, interpolated between the rates for SMALL and for LARGE pages."""
    if not speed.pages or page >= LARGE:
        return speed.disk
    part = math.log(max(page, SMALL) / SMALL) / math.log(LARGE / SMALL)
    return float(speed.pages ** (1 - part) * speed.disk**part)


def _values(weights: WeightCounts, values: float) -> float:
    """Return the number of values in norms that takes as long as the `values` of a row's products."""
    return values + NARROW * max(values - 2 * sum(weights.values()) / WIDTH, 0.0)


def _seconds(weights: WeightCounts, speed: Speed, rows: float) -> float:
    """Return the seconds of products with `rows` rows; a part of a row takes as long as a whole one."""
    if rows <= 0:
        return 0.0
    rows = max(rows, 1.0)
    return sum(2 * count * rows / speed.operations(kind, rows) for kind, count in weights.items())
