"""How much a step takes on, and what the KV cache holds of it: the same on every rank, and known before the run.

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

from mpillm.engine.scheduler import Limits, blocks_for
from mpillm.errors import JobError
from mpillm.kernels import KV_BLOCK, BlockType
from mpillm.model.activations import Activations
from mpillm.model.config import ModelConfig
from mpillm.model.kv import block_nbytes
from mpillm.model.spill import layers_in_file, most_blocks
from mpillm.partition.grid import Place, stage_layers
from mpillm.spec import Spec, shown_bytes

SEQUENCES, TOKENS = 256, 512  # what "auto" means in [batch] while all weights are in memory
MOST_TOKENS = 4096  # and at most while they are streamed
SHARE = 8  # the budgets' part that activations may take then: one in so many


@dataclass(frozen=True)
class StepSize:
    """What a step takes on, at most."""

    sequences: int
    tokens: int


def step_size(spec: Spec, rows: Activations, places: Sequence[Place], streams: bool) -> StepSize:
    """A step's size on ranks at `places`; `streams`: some of them stream weights."""
    row = max(rows.row_nbytes(place) for place in places)
    room = ((spec.memory.weights_bytes or 0) + spec.memory.kv_bytes) // SHARE
    tokens = min(max(room // row, TOKENS), MOST_TOKENS) if streams else TOKENS
    if spec.batch.max_num_batched_tokens != "auto":
        tokens = spec.batch.max_num_batched_tokens
    sequences = tokens if streams else SEQUENCES
    if spec.batch.max_num_seqs != "auto":
        sequences = spec.batch.max_num_seqs
    return StepSize(sequences, max(tokens, sequences))


def limits(
    spec: Spec,
    rows: Activations,
    places: Sequence[Place],
    kv_type: BlockType,
    max_context: int,
    streamed: Sequence[int],
) -> Limits:
    """What steps and the KV cache of ranks at `places` take; JobError if that is nothing.

    `streamed` has the bytes of weights that each rank streams, `max_context` is the longest request's tokens.
    """
    streams = any(streamed)
    config, step, stages = rows.config, step_size(spec, rows, places, streams), places[0].stages
    useful = blocks_for(max_context) * step.sequences * stages
    n_blocks, in_memory = kv_blocks(spec, config, places, kv_type, streamed)
    if n_blocks < 1:
        block = max(block_nbytes(config, place, kv_type) for place in places)
        raise JobError(
            f"memory.kv = {spec.memory.kv_bytes} bytes does not hold one block of {KV_BLOCK} tokens, which takes "
            f"{block} bytes; raise it."
        )
    n_blocks = min(n_blocks, useful)
    return Limits(
        n_blocks=n_blocks,
        blocks_in_memory=min(in_memory, n_blocks),
        max_sequences=min(step.sequences, n_blocks),
        max_tokens=step.tokens,
        micro_batches=stages,
        prefix_sharing=spec.batch.prefix_sharing,
        streams=streams,
    )


def kv_blocks(
    spec: Spec, config: ModelConfig, places: Sequence[Place], kv_type: BlockType, streamed: Sequence[int]
) -> tuple[int, int]:
    """Blocks that all ranks can have, and those of them that memory alone holds."""
    budget, spill = spec.memory.kv_bytes, spec.memory.kv_spill_bytes
    together, in_memory = [], []
    for place, weights in zip(places, streamed, strict=True):
        n_layers, block = len(stage_layers(config.n_layers, place)), block_nbytes(config, place, kv_type)
        in_memory.append(budget // block)
        of_a_layer = block // n_layers
        together.append(most_blocks(n_layers, budget // of_a_layer, min(weights, spill) // of_a_layer))
    return min(together), min(in_memory)


def kv_in_file(spec: Spec, config: ModelConfig, place: Place, kv_type: BlockType, n_blocks: int) -> int:
    """Bytes of the KV cache that lie on disk on the rank at `place` when all of so many blocks are in use."""
    n_layers, block = len(stage_layers(config.n_layers, place)), block_nbytes(config, place, kv_type)
    of_a_layer = block // n_layers
    return layers_in_file(n_layers, spec.memory.kv_bytes // of_a_layer, n_blocks) * n_blocks * of_a_layer


def described_step(sequences: int, tokens: int, streamed: int) -> str:
    """A step's size for people; `streamed` is what the rank that reads most reads for it."""
    size = f"a step takes up to {sequences} sequences and {tokens} tokens"
    return f"{shown_bytes(streamed)} of weights are read for each step; {size}" if streamed else size
