"""A step: what the sequences of a batch compute together, and what is wanted of each one's rows."""

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
    """Which final hidden states are wanted of a chunk (for embeddings)."""

    NONE = 0
    LAST = 1
    ALL = 2
    FIRST = 3


NO_IDS = np.empty(0, np.int32)


class Shifts(NamedTuple):
    """What is added to the logits of some ids that a token is drawn from, before and after the repetition penalty."""

    ids: Ints
    before: Floats
    after: Floats


NO_SHIFTS = Shifts(NO_IDS, NO_IDS.view(np.float32), NO_IDS.view(np.float32))


class Table(NamedTuple):
    """A sequence's block table in one group as it travels: its blocks from number `first` to the step's last token."""

    first: int
    blocks: Ints


class Chunk(msgspec.Struct, frozen=True):
    """What a step computes of one sequence: its tokens from `start` to `start + len(tokens)`.

    A draft of its next token is a chunk of its own behind it, for what may be drawn depends on all tokens before.
    """

    start: int
    tokens: Ints
    tables: tuple[Table, ...]  # of each group of layers
    slot: int = NO_SLOT  # of the sequence's states
    loads: int = NO_SLOT  # the slot of saved states with which the sequence goes on
    saves: int = NO_SLOT  # the slot in which its states after the chunk are saved
    second: int = NO_SECOND  # the position at which the sequence's second segment begins
    score_k: int = -1  # score each token's successor, with this many alternatives; -1: do not
    successor: int = NO_TARGET  # the token after the last one, if known
    sample_k: int = 0  # candidates wanted for the token after the last one; 0: none
    logprobs: int = -1  # log-probabilities wanted of that token and of so many alternatives; -1: of none
    temperature: float = 0.0
    penalty: float = 1.0
    seen: Ints = NO_IDS  # distinct ids that the penalty is for
    shifts: Shifts = NO_SHIFTS
    allowed: Ints = NO_IDS  # a bit for each id that may be drawn; empty if all may
    hidden: Hidden = Hidden.NONE
    adapter: int = NO_ADAPTER  # the number of the adapter that the sequence has
    long: bool = False  # whether the sequence is longer than LongRoPE's short factors are for

    @property
    def adjusted(self) -> bool:
        """Whether a token is drawn from other logits than the model's."""
        return self.penalty != 1.0 or len(self.shifts.ids) > 0 or len(self.allowed) > 0


class Output(NamedTuple):
    """One row of logits that somebody needs, and what of it."""

    row: int  # in the step's batch
    k: int  # candidates wanted
    target: int  # the id whose logit is wanted, or NO_TARGET
    inv_t: float  # 1 / temperature, for the second normaliser
    chunk: int  # index of the chunk, whose adjustments apply if `adjusted`
    adjusted: bool
    sampled: bool  # a token is drawn from it, so more candidates may be asked for
    normalised: bool  # probabilities are wanted, so both normalisers must be known


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
                    # Log-probabilities are of the model's own distribution: look at the row as it is, too.
                    yield Output(last, max(chunk.logprobs, 1), NO_TARGET, 1.0, index, False, False, True)
                normalised = wanted or chunk.temperature > 0
                yield Output(last, chunk.sample_k, NO_TARGET, inv_t, index, adjusted, True, normalised)
            row += count

    def hidden_rows(self) -> Ints:
        """Rows of the batch whose final hidden state is wanted: int32 [rows], ascending."""
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
        """The arrays that the decoder works on."""
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
    """What the chunks have, for each of their rows; `counts` are None where each chunk has one row."""
    return values if counts is None else np.repeat(values, counts)


def _group_tables(tables: Sequence[Table], counts: Ints | None, positions: Ints) -> GroupTables:
    """The tables of one group, one after the other, behind padding: kernels count a sequence's blocks from its first
    one, also from where that is no longer kept. Neighbouring chunks of one sequence share theirs, and so the kernels
    look at its keys and values once."""
    own: list[Ints] = []
    starts: list[int] = []  # of each chunk: where the table would have the sequence's first block
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
