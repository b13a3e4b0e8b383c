"""A step: the chunks that a batch of sequences computes together, and the outputs wanted from their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from mpillm.engine.blocks import NO_SLOT
from mpillm.engine.sampler import inverse_temperature
from mpillm.kernels import KV_BLOCK
from mpillm.model.batch import NO_ADAPTER, Batch
from mpillm.model.kv import GroupTables, StateMoves

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

NO_TARGET = -1
NO_SECOND = 2**31 - 1


class Hidden(IntEnum):
    """Which final hidden states of a chunk are requested (for embeddings)."""

    NONE = 0
    LAST = 1
    ALL = 2
    FIRST = 3


NO_IDS = np.empty(0, np.int32)


class Shifts(NamedTuple):
    """Summands of the logits of some ids, before and after the repetition penalty."""

    ids: Ints
    before: Floats
    after: Floats


NO_SHIFTS = Shifts(NO_IDS, NO_IDS.view(np.float32), NO_IDS.view(np.float32))


class Table(NamedTuple):
    """A sequence's block table in one group, as it is sent: its blocks from index `first` to the step's last token."""

    first: int
    blocks: Ints


class Chunk(msgspec.Struct, frozen=True):
    """The tokens of one sequence from `start` to `start + len(tokens)` that a step computes.

    Each draft is a chunk of its own after it, because what may be drawn depends on all tokens before.
    """

    start: int
    tokens: Ints
    tables: tuple[Table, ...]  # one for each group of layers
    slot: int = NO_SLOT  # the slot of the sequence's states
    loads: int = NO_SLOT  # the slot of the saved states with which the chunk begins
    saves: int = NO_SLOT  # the slot in which the states after the chunk are saved
    second: int = NO_SECOND  # the position at which the sequence's second segment begins
    score_k: int = -1  # score each token's successor, with this many alternatives; -1: do not score
    successor: int = NO_TARGET  # the token after the last one, if it is known
    sample_k: int = 0  # the number of candidates for the token after the last one; 0: none
    logprobs: int = -1  # wanted log-probabilities: of that token and this many alternatives; -1: none
    temperature: float = 0.0
    penalty: float = 1.0
    seen: Ints = NO_IDS  # the distinct ids that the repetition penalty applies to
    shifts: Shifts = NO_SHIFTS
    allowed: Ints = NO_IDS  # a bit for each id that may be drawn; empty allows all
    hidden: Hidden = Hidden.NONE
    adapter: int = NO_ADAPTER  # the number of the sequence's adapter
    long: bool = False  # whether the sequence uses LongRoPE's long factors

    @property
    def adjusted(self) -> bool:
        """Whether a token is drawn from adjusted logits rather than the model's."""
        return self.penalty != 1.0 or len(self.shifts.ids) > 0 or len(self.allowed) > 0


class Output(NamedTuple):
    """One row of logits, and what the reply contains of it."""

    row: int  # index of the row in the step's batch
    k: int  # the number of candidates
    target: int  # the id whose logit is wanted, or NO_TARGET
    inv_t: float  # 1 / temperature, for the second normaliser
    chunk: int  # index of the chunk, whose adjustments apply if `adjusted`
    adjusted: bool
    sampled: bool  # a token is drawn from it, so more candidates may be fetched
    normalised: bool  # probabilities are wanted, so both normalisers are needed


@dataclass(frozen=True)
class Step:
    """A batch of chunks."""

    number: int
    chunks: tuple[Chunk, ...]

    @cached_property
    def outputs(self) -> list[Output]:
        """The outputs in the order of all replies: for each chunk its scored rows, then its sampled row."""
        return list(self._outputs())

    def _outputs(self) -> Iterator[Output]:
        row = 0
        for index, chunk in enumerate(self.chunks):
            count = len(chunk.tokens)
            if chunk.score_k >= 0:
                targets = [*chunk.tokens[1:].tolist(), chunk.successor]
                for i, target in enumerate(targets):
                    if target != NO_TARGET:
                        yield Output(row + i, chunk.score_k, target, 1.0, index, False, False, True)
            last = row + count - 1
            if chunk.sample_k > 0:
                inv_t = inverse_temperature(chunk.temperature)
                adjusted = chunk.adjusted
                wanted = chunk.logprobs >= 0
                if adjusted and wanted:
                    # Log-probabilities are of the model's distribution, so the row without adjustments is needed too.
                    yield Output(last, max(chunk.logprobs, 1), NO_TARGET, 1.0, index, False, False, True)
                normalised = wanted or chunk.temperature > 0
                yield Output(last, chunk.sample_k, NO_TARGET, inv_t, index, adjusted, True, normalised)
            row += count

    def hidden_rows(self) -> Ints:
        """Return the rows of the batch whose final hidden state is wanted: int32 [rows], ascending."""
        rows: list[int] = []
        row = 0
        for chunk in self.chunks:
            count = len(chunk.tokens)
            if chunk.hidden is Hidden.ALL:
                rows.extend(range(row, row + count))
            elif chunk.hidden is Hidden.LAST:
                rows.append(row + count - 1)
            elif chunk.hidden is Hidden.FIRST:
                rows.append(row)
            row += count
        return np.array(rows, np.int32)

    def batch(self) -> Batch:
        """Return the arrays that the decoder takes."""
        tokens = np.concatenate([chunk.tokens for chunk in self.chunks])
        starts = np.array([chunk.start for chunk in self.chunks], np.int32)
        if len(tokens) == len(self.chunks):
            counts, rows, positions = None, np.arange(len(tokens), dtype=np.int32), starts
        else:
            counts = np.array([len(chunk.tokens) for chunk in self.chunks], np.int32)
            rows = np.cumsum(counts, dtype=np.int32) - counts
            positions = np.arange(len(tokens), dtype=np.int32) + _each(starts - rows, counts)
        adapters = [chunk.adapter for chunk in self.chunks]
        seconds = [chunk.second for chunk in self.chunks]
        long = [chunk.long for chunk in self.chunks]
        tables = zip(*(chunk.tables for chunk in self.chunks), strict=True)
        return Batch(
            tokens=tokens,
            positions=positions,
            offset=positions % KV_BLOCK,
            groups=tuple(_group_tables(group, counts, positions) for group in tables),
            first_rows=rows,
            slots=np.array([chunk.slot for chunk in self.chunks], np.int32),
            states=self._state_moves(),
            adapters=_each(np.array(adapters, np.int32), counts) if any(adapters) else None,
            second=positions >= _each(np.array(seconds, np.int32), counts)
            if min(seconds) < NO_SECOND
            else None,
            long=_each(np.array(long), counts) if any(long) else None,
        )

    def _state_moves(self) -> StateMoves:
        chunks = [chunk for chunk in self.chunks if chunk.slot != NO_SLOT]
        return StateMoves(
            fresh=[chunk.slot for chunk in chunks if chunk.start == 0],
            loaded=[(chunk.slot, chunk.loads) for chunk in chunks if chunk.loads != NO_SLOT],
            saved=[(chunk.saves, chunk.slot) for chunk in chunks if chunk.saves != NO_SLOT],
        )


def _each(values: NDArray[Any], counts: Ints | None) -> NDArray[Any]:
    """Repeat the values of the chunks for each of their rows; `counts` is None if each chunk has one row."""
    return values if counts is None else np.repeat(values, counts)


def _group_tables(tables: Sequence[Table], counts: Ints | None, positions: Ints) -> GroupTables:
    """Concatenate the tables of one group of layers, after padding.

    The kernels count blocks from the first one of a sequence, even if it was released; the padding keeps the places of
    first blocks at 0 or above. Neighbouring chunks of one sequence share a table, so the kernels read its keys and
    values once.
    """
    own: list[Ints] = []
    starts: list[int] = []  # the place of the sequence's first block, for each chunk
    start = end = 0
    before: Table | None = None
    for table in tables:
        if not _same(table, before):
            start = end - table.first
            end += len(table.blocks)
            own.append(table.blocks)
        starts.append(start)
        before = table
    padding = max(-min(starts), 0)
    if padding:
        own.insert(0, np.zeros(padding, np.int32))
    blocks = np.concatenate(own)
    table_start = _each(np.array(starts, np.int32) + np.int32(padding), counts)
    return GroupTables(blocks, table_start, blocks[table_start + positions // KV_BLOCK], padding)


def _same(one: Table, other: Table | None) -> bool:
    if other is None or len(one.blocks) != len(other.blocks) or one.first != other.first:
        return False
    return bool(one.blocks[-1] == other.blocks[-1]) and np.array_equal(one.blocks, other.blocks)
