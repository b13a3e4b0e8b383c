"""The size of a step and of the KV cache: the same on every rank, and known before the run.

If all weights are in memory, the time of a step is that of its rows. If weights are streamed, each step reads all of
them from disk, whatever the number of its rows. So a step then takes all that can run: as many sequences as the KV
cache has blocks for, and prompts in pieces of thousands of tokens. The limit is the memory for the rows' activations:
an eighth of the budgets for weights and KV cache. More rows would gain little. A row needs 2 operations for each
weight, so if each weight has B bytes, the disk reads D bytes/s and the cores compute C operations/s, then computing
takes as long as reading with B C / 2 D rows: 50 for Q4_0 from an SSD on two cores, 4000 for BF16 at 100 MB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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

SEQUENCES, TOKENS = 256, 512  # the meaning of "auto" in [batch] if all weights are in memory
MAX_TOKENS = 4096  # the maximum tokens of a step with "auto" if weights are streamed
SAVED, MAX_SAVED = 8, 64  # one in SAVED slots for states holds a saved state, at most MAX_SAVED
SHARE = 8  # if weights are streamed, activations may take 1 / SHARE of the budgets


@dataclass(frozen=True)
class StepSize:
    """The maximum size of a step."""

    sequences: int
    tokens: int


def step_size(spec: Spec, rows: Activations, places: Sequence[Place], streams: bool) -> StepSize:
    """Return the size of a step on ranks at `places`; `streams`: some of them stream weights.

    If tokens attend to later ones, a step takes a prompt of the maximum length.
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
    part: float = 1.0,
) -> Limits:
    """Return the limits of steps and caches on ranks at `places`; JobError if the caches are too small for any request.

    For each rank, `layouts` has the layout of its cache, `streamed` the bytes of weights that it streams, and `kv` the
    budget of its cache (None: that of `spec` for all). `max_context` is the maximum number of tokens of a request, and
    `asked` is what the input asks for. `part` is the part of its lines that this replica is to compute; if it
    computes more of them, it takes no more memory.
    """
    streams = any(streamed)
    step, stages, windows = step_size(spec, rows, places, streams), places[0].stages, layouts[0].windows
    capacity = cache_capacity(spec, layouts, streamed, step.sequences * stages, kv)
    if problem := capacity.problem(spec, layouts):
        raise JobError(problem)
    used = used_capacity(capacity, rows.config, step, windows, max_context, stages, asked, part)
    return Limits(
        n_blocks=used.blocks,
        blocks_in_memory=used.blocks_in_memory,
        max_sequences=capacity.sequences(step.sequences, windows),
        max_tokens=step.tokens,
        micro_batches=stages,
        prefix_sharing=spec.batch.prefix_sharing,
        speculation=spec.batch.speculation,
        streams=streams,
        windows=windows,
        n_slots=used.slots,
        n_saved=used.saved,
        whole_prompts=rows.config.whole_prompts,
        short_length=rows.config.short_length,
    )


@dataclass(frozen=True)
class CacheCapacity:
    """The capacity that the caches of all ranks have in common."""

    blocks: int
    blocks_in_memory: int  # the blocks that memory alone holds
    slots: int  # slots for sequences' states; 0 if the model has none
    saved: int  # additional slots for the states after prefixes that sequences have in common

    @property
    def states(self) -> int:
        """All slots."""
        return self.slots + self.saved

    def sequences(self, maximum: int, windows: Sequence[int]) -> int:
        """Return the number of sequences that a step can have, up to `maximum`."""
        if windows:
            maximum = min(maximum, max(self.blocks // len(windows), 1))
        return min(maximum, self.slots) if self.slots else maximum

    def needed(
        self, groups: int, asked: InputNeeds, step: StepSize, stages: int, part: float = 1.0
    ) -> tuple[int, int]:
        """Return the maximum number of blocks and states that a part of an input uses; all of them if unknown.

        Full blocks are kept after their sequence has ended. The blocks that are not full are those of the sequences
        that run at once.
        """
        if not asked.lines or asked.blocks is None:
            return self.blocks, self.states
        blocks = groups * asked.blocks_at_once(step.sequences * stages, step.tokens * stages, part)
        return min(self.blocks, blocks), self.slots_of(asked, part) + min(self.saved, asked.alike)

    def slots_of(self, asked: InputNeeds, part: float) -> int:
        """Slots that a part of an input can come to use."""
        return min(self.slots, max(asked.sequences_of(part), 1)) if asked.lines else self.slots

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
    """Return the capacity of memory.kv and memory.kv_spill on all ranks if up to `sequences` sequences run at once.

    `kv` has the budget of each rank (None: that of `spec` for all). States get up to half of memory.kv, or all of it if
    layers keep nothing else. An eighth of their slots is for saved states.
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


def used_capacity(
    capacity: CacheCapacity,
    config: ModelConfig,
    step: StepSize,
    windows: Sequence[int],
    max_context: int,
    stages: int,
    asked: InputNeeds,
    part: float = 1.0,
) -> CacheCapacity:
    """Return the part of a capacity that a run takes: for steps and a part of the input, or the longest request.

    A replica that computes more than its part takes no more of it.
    """
    longest = useful_blocks(max_context, windows, step.tokens)
    useful = longest * step.sequences
    if config.whole_prompts:  # the blocks of the steps under way; each sequence has one that is not full
        useful = blocks_for(step.tokens) + step.sequences
    needed, _ = capacity.needed(len(windows), asked, step, stages, part)
    blocks = min(capacity.blocks, useful * stages, max(needed, longest))
    in_memory = min(capacity.blocks_in_memory, blocks)
    return replace(capacity, blocks=blocks, blocks_in_memory=in_memory, slots=capacity.slots_of(asked, part))


def useful_blocks(tokens: int, windows: Sequence[int], step_tokens: int) -> int:
    """Return the maximum blocks, in all groups, of a sequence of `tokens` tokens, `step_tokens` of them in one step."""
    return sum(
        min(blocks_for(tokens), window_blocks(window) + blocks_for(step_tokens))
        if window
        else blocks_for(tokens)
        for window in windows
    )


def cached_tokens(n_blocks: int, windows: Sequence[int], max_context: int) -> int:
    """Return the tokens that `n_blocks` blocks hold in sequences of `max_context` tokens; 0 if tokens are not kept."""
    if not windows:
        return 0
    return n_blocks * KV_BLOCK * blocks_for(max_context) // blocks_needed(max_context, windows)


def cache_in_memory(spec: Spec, layout: CacheLayout, n_blocks: int, n_slots: int, capacity: int) -> int:
    """Return the maximum bytes of memory of a rank's cache if `n_blocks` of `capacity` blocks are used.

    Large pools consist of huge pages, each of which takes all of its memory as soon as one of its blocks is used.
    """
    held = n_slots * layout.state_nbytes
    for nbytes in chain.from_iterable(layout.pools):
        page = HUGE_PAGE if capacity * nbytes >= HUGE else 1
        held += min(-(-n_blocks * nbytes // page) * page, capacity * nbytes)
    return min(held, spec.memory.kv_bytes)


def cache_in_file(spec: Spec, layout: CacheLayout, n_blocks: int, n_slots: int) -> int:
    """Return the bytes of a rank's cache that are on disk if `n_blocks` blocks are used."""
    sizes = [sum(nbytes) for nbytes in layout.pools]
    return nbytes_in_file(sizes, spec.memory.kv_bytes - n_slots * layout.state_nbytes, n_blocks)


def step_description(sequences: int, tokens: int, streamed: int) -> str:
    """Return the size of a step in words; `streamed` is the maximum number of bytes that a rank reads for it."""
    size = f"a step has up to {count_of(sequences, 'sequence')} and {count_of(tokens, 'token')}"
    return f"{shown_bytes(streamed)} of weights are read for each step; {size}" if streamed else size
