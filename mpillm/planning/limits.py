"""The size of a step and of the KV cache: the same on every rank, and known before the run.

While all weights are in memory a step costs what its rows cost. While weights are streamed it costs a whole pass over
the disk as well, whatever runs in it, so a step takes all that can run: as many sequences as the KV cache has blocks
for, and prompts in pieces of thousands of tokens. What bounds it is the memory for the rows' activations, of which an
eighth of the budgets for weights and KV cache is allowed. More would hardly pay: a row's arithmetic is 2 operations
for each weight, so where B of a weight's bytes are streamed at D bytes/s and computing goes at C operations/s, it takes
B C / 2 D rows to compute for as long as the disk reads. Those are 50 rows for Q4_0 from an SSD on two cores, and 4000
for BF16 from 100 MB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from mpillm.engine.limits import Limits
from mpillm.errors import JobError
from mpillm.kernels import KV_BLOCK
from mpillm.model.activations import Activations
from mpillm.model.cache_layout import CacheLayout, blocks_for, blocks_needed, window_blocks
from mpillm.model.config import ModelConfig
from mpillm.model.spill import HUGE, HUGE_PAGE, maximum_blocks, nbytes_in_file
from mpillm.partition.grid import Place
from mpillm.planning.input_needs import NO_INPUT, InputNeeds
from mpillm.spec import Spec, shown_bytes, unit_meant
from mpillm.words import count_of, enough

SEQUENCES, TOKENS = 256, 512  # what "auto" means in [batch] while all weights are in memory
MAX_TOKENS = 4096  # and at most while they are streamed
SAVED, MAX_SAVED = 8, 64  # one in so many slots for states is for saved ones, and so many at most
SHARE = 8  # the budgets' part that activations may take then: one in so many


@dataclass(frozen=True)
class StepSize:
    """The maximum size of a step."""

    sequences: int
    tokens: int


def step_size(spec: Spec, rows: Activations, places: Sequence[Place], streams: bool) -> StepSize:
    """A step's size on ranks at `places`; `streams`: some of them stream weights.

    Where tokens attend to later ones, a step takes the longest prompt there may be.
    """
    row = max(rows.row_nbytes(place) for place in places)
    allowed = ((spec.memory.weights_bytes or 0) + spec.memory.kv_bytes) // SHARE
    tokens = min(max(allowed // row, TOKENS), MAX_TOKENS) if streams else TOKENS
    if spec.batch.max_num_batched_tokens != "auto":
        tokens = spec.batch.max_num_batched_tokens
    sequences = tokens if streams else SEQUENCES
    if spec.batch.max_num_seqs != "auto":
        sequences = spec.batch.max_num_seqs
    if rows.config.whole_prompts:
        tokens = max(tokens, spec.memory.context(rows.config.max_position))
    return StepSize(sequences, max(tokens, sequences))


def limits(
    spec: Spec,
    rows: Activations,
    places: Sequence[Place],
    layouts: Sequence[CacheLayout],
    max_context: int,
    streamed: Sequence[int],
    kv: Sequence[int] | None = None,
    asked: InputNeeds = NO_INPUT,
) -> Limits:
    """What steps and the cache of ranks at `places` take, whose caches have `layouts`; JobError if that is nothing.

    `streamed` has the bytes of weights that each rank streams, `max_context` is the longest request's tokens, `kv`
    has the budget of each rank's cache, where they are not all that of `spec`, and `asked` what the input asks for.
    """
    streams = any(streamed)
    step, stages, windows = step_size(spec, rows, places, streams), places[0].stages, layouts[0].windows
    capacity = cache_capacity(spec, layouts, streamed, step.sequences * stages, kv)
    if problem := capacity.problem(spec, layouts):
        raise JobError(problem)
    n_blocks = cache_blocks(capacity, rows.config, step, windows, max_context, stages, asked)
    return Limits(
        n_blocks=n_blocks,
        blocks_in_memory=min(capacity.blocks_in_memory, n_blocks),
        max_sequences=capacity.sequences(step.sequences, windows),
        max_tokens=step.tokens,
        micro_batches=stages,
        prefix_sharing=spec.batch.prefix_sharing,
        speculation=spec.batch.speculation,
        streams=streams,
        windows=windows,
        n_slots=capacity.slots,
        n_saved=capacity.saved,
        whole_prompts=rows.config.whole_prompts,
        short_length=rows.config.short_length,
    )


@dataclass(frozen=True)
class CacheCapacity:
    """What the caches of all ranks hold."""

    blocks: int
    blocks_in_memory: int  # of them: what memory alone holds
    slots: int  # for sequences' states; 0 if the model has none
    saved: int  # beside them, for states after prefixes that sequences have in common

    @property
    def states(self) -> int:
        """All slots."""
        return self.slots + self.saved

    def sequences(self, maximum: int, windows: Sequence[int]) -> int:
        """The number of sequences, up to `maximum`, that can be in a step at once."""
        if windows:
            maximum = min(maximum, max(self.blocks // len(windows), 1))
        return min(maximum, self.slots) if self.slots else maximum

    def needed(self, groups: int, asked: InputNeeds, step: StepSize, stages: int) -> tuple[int, int]:
        """Blocks and states that an input can come to use, or all if there is none, or it is not known.

        Full blocks keep what they hold; of the last ones there are as many as sequences run at once.
        """
        if not asked.lines or asked.blocks is None:
            return self.blocks, self.states
        blocks = groups * asked.blocks_at_once(step.sequences * stages, step.tokens * stages)
        return min(self.blocks, blocks), min(self.slots, asked.sequences) + min(self.saved, asked.alike)

    def problem(self, spec: Spec, layouts: Sequence[CacheLayout]) -> str | None:
        """Why nothing can run; None if something can."""
        windows = layouts[0].windows
        if self.blocks >= len(windows) and (self.slots or not layouts[0].state_nbytes):
            return None
        block = max(layout.block_nbytes for layout in layouts) * len(windows)
        parts = [f"{KV_BLOCK} tokens take {enough(block)}"] if block else []
        if state := max(layout.state_nbytes for layout in layouts):
            parts.append(f"a sequence's states take {enough(state)}")
        needed = f"memory.kv = {spec.memory.kv} is too small: {' and '.join(parts)} on some rank"
        return f"{needed}; raise it{unit_meant(spec.memory.kv)}."


def cache_capacity(
    spec: Spec,
    layouts: Sequence[CacheLayout],
    streamed: Sequence[int],
    sequences: int,
    kv: Sequence[int] | None = None,
) -> CacheCapacity:
    """What memory.kv and memory.kv_spill hold on all ranks, where up to `sequences` sequences run at once.

    `kv` has the budget of each rank, where they are not all that of `spec`.

    States get up to half of memory.kv, and all of it where layers keep nothing else; an eighth of their slots is for
    those that are saved.
    """
    budgets = kv or [spec.memory.kv_bytes] * len(layouts)
    slots = saved = 0
    states = max(layout.state_nbytes for layout in layouts)
    if states:
        share = 2 if layouts[0].windows else 1
        slots = min(budgets) // share // states
        saved = min(slots // SAVED, MAX_SAVED) if spec.batch.prefix_sharing else 0
        slots = min(slots - saved, sequences)
    blocks, in_memory = [], []
    for layout, weights, budget in zip(layouts, streamed, budgets, strict=True):
        left = budget - (slots + saved) * layout.state_nbytes
        if layout.pools:
            sizes = [sum(nbytes) for nbytes in layout.pools]
            in_memory.append(left // layout.block_nbytes)
            blocks.append(maximum_blocks(sizes, left, min(weights, spec.memory.kv_spill_bytes)))
    return CacheCapacity(min(blocks, default=0), min(in_memory, default=0), slots, saved)


def cache_blocks(
    capacity: CacheCapacity,
    config: ModelConfig,
    step: StepSize,
    windows: Sequence[int],
    max_context: int,
    stages: int,
    asked: InputNeeds,
) -> int:
    """The blocks that a cache has: not more than steps or the input can use, but those of the longest request."""
    longest = useful_blocks(max_context, windows, step.tokens)
    useful = longest * step.sequences
    if config.whole_prompts:  # what is in steps under way, with one block each that is not full
        useful = blocks_for(step.tokens) + step.sequences
    needed, _ = capacity.needed(len(windows), asked, step, stages)
    return min(capacity.blocks, useful * stages, max(needed, longest))


def useful_blocks(tokens: int, windows: Sequence[int], step_tokens: int) -> int:
    """Blocks of all groups that a sequence of `tokens` tokens uses at most, `step_tokens` of them at once."""
    return sum(
        min(blocks_for(tokens), window_blocks(window) + blocks_for(step_tokens))
        if window
        else blocks_for(tokens)
        for window in windows
    )


def cached_tokens(n_blocks: int, windows: Sequence[int], max_context: int) -> int:
    """Tokens that so many blocks hold in sequences of `max_context` tokens; 0 if the model keeps no tokens."""
    if not windows:
        return 0
    return n_blocks * KV_BLOCK * blocks_for(max_context) // blocks_needed(max_context, windows)


def cache_in_memory(spec: Spec, layout: CacheLayout, n_blocks: int, n_slots: int, capacity: int) -> int:
    """Bytes of memory that the cache of a rank takes at most, where `n_blocks` of `capacity` blocks are used.

    Large pools are used in huge pages, of which a first block takes a whole one, but for what is less at their end.
    """
    held = n_slots * layout.state_nbytes
    for nbytes in chain.from_iterable(layout.pools):
        page = HUGE_PAGE if capacity * nbytes >= HUGE else 1
        held += min(-(-n_blocks * nbytes // page) * page, capacity * nbytes)
    return min(held, spec.memory.kv_bytes)


def cache_in_file(spec: Spec, layout: CacheLayout, n_blocks: int, n_slots: int) -> int:
    """Bytes of a rank's cache that lie on disk when all of so many blocks are in use."""
    sizes = [sum(nbytes) for nbytes in layout.pools]
    return nbytes_in_file(sizes, spec.memory.kv_bytes - n_slots * layout.state_nbytes, n_blocks)


def step_description(sequences: int, tokens: int, streamed: int) -> str:
    """A step's size in words; `streamed` is the number of bytes that the rank with the most reads for it."""
    size = f"a step has up to {count_of(sequences, 'sequence')} and {count_of(tokens, 'token')}"
    return f"{shown_bytes(streamed)} of weights are read for each step; {size}" if streamed else size
