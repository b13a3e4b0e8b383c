"""The one message that a step needs: what every rank must know to compute its part, packed as integers.

A step is complete in itself: block tables, positions and token ids travel in it, so a follower keeps no state
about sequences. The layout, all little-endian 32-bit words: a 28-byte header (kind and magic, step number, chunks,
tokens, table entries, seen ids, groups of layers); for each chunk its ten fields (start, tokens, slot, score_k,
successor, sample_k with logprobs + 1 in its highest byte, seen ids, hidden, and as floats temperature and penalty),
and for each group the number of its first block and how many it has; then all tokens, block tables (chunk by chunk, and
by group in each), and seen ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpillm.engine.blocks import NO_SLOT
from mpillm.engine.sampler import inverse_temperature
from mpillm.kernels import KV_BLOCK
from mpillm.model.decoder import Batch
from mpillm.model.kv import GroupTables

Ints = NDArray[np.int32]

HEADER = struct.Struct("<7I")
MAGIC = 0x6D706900  # "mpi" and a byte for the kind
FIELDS = 10  # of a chunk, and two more for each group
NO_TARGET = -1


class Kind(IntEnum):
    """What a message asks of the ranks."""

    STEP = 0  # compute this batch
    FETCH = 1  # send more candidates of a step's outputs
    STOP = 2  # leave; the step number is the exit code


class Hidden(IntEnum):
    """Which final hidden states are wanted of a chunk (for embeddings)."""

    NONE = 0
    LAST = 1
    ALL = 2


NO_IDS = np.empty(0, np.int32)


class Table(NamedTuple):
    """A sequence's block table in one group as it travels: its blocks from number `first` to the step's last token."""

    first: int
    blocks: Ints


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a step computes of one sequence: its tokens from `start` to `start + len(tokens)`."""

    start: int
    tokens: Ints
    tables: tuple[Table, ...]  # of each group of layers
    slot: int = NO_SLOT  # of the sequence's states
    score_k: int = -1  # score each token's successor, with this many alternatives; -1: do not
    successor: int = NO_TARGET  # the token after the last one, if known
    sample_k: int = 0  # candidates wanted for the token after the last one; 0: none
    logprobs: int = -1  # log-probabilities wanted of that token and of so many alternatives; -1: of none
    temperature: float = 0.0
    penalty: float = 1.0
    seen: Ints = field(default_factory=lambda: NO_IDS)  # distinct ids that the penalty is for
    hidden: Hidden = Hidden.NONE


class Output(NamedTuple):
    """One row of logits that somebody needs, and what of it."""

    row: int  # in the step's batch
    k: int  # candidates wanted
    target: int  # the id whose logit is wanted, or NO_TARGET
    inv_t: float  # 1 / temperature, for the second normaliser
    chunk: int  # index of the chunk, whose penalty applies if `penalised`
    penalised: bool
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
                penalised = chunk.penalty != 1.0
                wanted = chunk.logprobs >= 0
                if penalised and wanted:
                    # Log-probabilities are of the model's own distribution: look at the row as it is, too.
                    yield Output(last, max(chunk.logprobs, 1), NO_TARGET, 1.0, index, False, False, True)
                normalised = wanted or chunk.temperature > 0
                yield Output(last, chunk.sample_k, NO_TARGET, inv_t, index, penalised, True, normalised)
            row += count

    def hidden_rows(self) -> Ints:
        """Rows of the batch whose final hidden state is wanted, ascending."""
        rows: list[int] = []
        row = 0
        for chunk in self.chunks:
            count = len(chunk.tokens)
            if chunk.hidden is Hidden.ALL:
                rows.extend(range(row, row + count))
            elif chunk.hidden is Hidden.LAST:
                rows.append(row + count - 1)
            row += count
        return np.array(rows, np.int32)

    def batch(self) -> Batch:
        """The arrays that the decoder works on."""
        tokens = np.concatenate([chunk.tokens for chunk in self.chunks])
        counts = np.array([len(chunk.tokens) for chunk in self.chunks], np.int32)
        starts = np.array([chunk.start for chunk in self.chunks], np.int32)
        rows = np.cumsum(counts, dtype=np.int32) - counts
        positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(starts - rows, counts)
        tables = zip(*(chunk.tables for chunk in self.chunks), strict=True)
        return Batch(
            tokens=tokens,
            positions=positions,
            offset=positions % KV_BLOCK,
            groups=tuple(_group_tables(group, counts, positions) for group in tables),
            first_rows=rows,
            slots=np.array([chunk.slot for chunk in self.chunks], np.int32),
        )

    def encode(self) -> bytes:
        """The message."""
        fields = np.array([_fields(chunk) for chunk in self.chunks], np.int32)
        floats = [(chunk.temperature, chunk.penalty) for chunk in self.chunks]
        fields[:, FIELDS - 2 : FIELDS] = np.array(floats, np.float32).view(np.int32)
        tokens = [chunk.tokens for chunk in self.chunks]
        blocks = [table.blocks for chunk in self.chunks for table in chunk.tables]
        seen = [chunk.seen for chunk in self.chunks]
        body = np.concatenate([fields.ravel(), *tokens, *blocks, *seen])
        sizes = (sum(map(len, arrays)) for arrays in (tokens, blocks, seen))
        groups = len(self.chunks[0].tables)
        return (
            HEADER.pack(MAGIC | Kind.STEP, self.number, len(self.chunks), *sizes, groups)
            + body.astype("<i4").tobytes()
        )

    @staticmethod
    def decode(message: bytes) -> Step:
        """The step of a message whose kind is STEP."""
        _, number, chunks, tokens, table, seen, groups = HEADER.unpack_from(message)
        words = np.frombuffer(message, "<i4", offset=HEADER.size).astype(np.int32, copy=False)
        width = FIELDS + 2 * groups
        if len(words) != chunks * width + tokens + table + seen:
            raise ValueError(f"a step message of {len(message)} bytes does not match its header")
        fields = words[: chunks * width].reshape(chunks, width)
        _check(fields, tokens, table, seen)
        at_tokens = chunks * width
        at_table = at_tokens + tokens
        at_seen = at_table + table
        decoded = []
        for row in fields:
            start, n_tokens, slot, score_k, successor, packed_k, n_seen, hidden = row[: FIELDS - 2].tolist()
            temperature, penalty = row[FIELDS - 2 : FIELDS].view(np.float32).tolist()
            tables = []
            for first, n_blocks in row[FIELDS:].reshape(groups, 2).tolist():
                tables.append(Table(first, words[at_table : at_table + n_blocks]))
                at_table += n_blocks
            decoded.append(
                Chunk(
                    start=start,
                    tokens=words[at_tokens : at_tokens + n_tokens],
                    tables=tuple(tables),
                    slot=slot,
                    score_k=score_k,
                    successor=successor,
                    sample_k=packed_k & 0xFFFFFF,
                    logprobs=(packed_k >> 24) - 1,
                    temperature=temperature,
                    penalty=penalty,
                    seen=words[at_seen : at_seen + n_seen],
                    hidden=Hidden(hidden),
                )
            )
            at_tokens, at_seen = at_tokens + n_tokens, at_seen + n_seen
        return Step(number, tuple(decoded))


def _group_tables(tables: Sequence[Table], counts: Ints, positions: Ints) -> GroupTables:
    """The tables of one group, one after the other, behind padding: kernels count a sequence's blocks from its first
    one, also from where that is no longer kept."""
    sizes = np.array([len(table.blocks) for table in tables], np.int32)
    begins = np.cumsum(sizes, dtype=np.int32) - sizes - np.array([table.first for table in tables], np.int32)
    padding = max(-int(begins.min()), 0)
    table = np.concatenate([np.zeros(padding, np.int32), *(table.blocks for table in tables)])
    table_start = np.repeat(begins + np.int32(padding), counts)
    return GroupTables(table, table_start, table[table_start + positions // KV_BLOCK], padding)


def _check(fields: Ints, tokens: int, table: int, seen: int) -> None:
    """ValueError unless the chunks' sizes sum up to the header's, and each chunk's tokens lie in its blocks."""
    exact = fields.astype(np.int64)
    starts, counts, seen_ids = exact[:, 0], exact[:, 1], exact[:, 6]
    firsts, blocks = exact[:, FIELDS::2], exact[:, FIELDS + 1 :: 2]
    sums = [int(sizes.sum()) for sizes in (counts, blocks, seen_ids)]
    negative = any((sizes < 0).any() for sizes in (counts, firsts, blocks, seen_ids))
    if not len(fields) or negative or sums != [tokens, table, seen]:
        raise ValueError("the chunks of a step message do not match its header")
    first, last = starts[:, None], (starts + counts)[:, None] - 1
    outside = (firsts * KV_BLOCK > first) | (last >= (firsts + blocks) * KV_BLOCK)
    if starts.min() < 0 or counts.min() < 1 or outside.any():
        raise ValueError("a step message has a chunk whose tokens lie outside its blocks")


def _fields(chunk: Chunk) -> tuple[int, ...]:
    """The fields of a chunk; the zeros are replaced by the bits of the floats."""
    packed_k = chunk.sample_k | (chunk.logprobs + 1) << 24
    tables = (number for table in chunk.tables for number in (table.first, len(table.blocks)))
    return (
        chunk.start, len(chunk.tokens), chunk.slot, chunk.score_k, chunk.successor, packed_k, len(chunk.seen),
        chunk.hidden, 0, 0, *tables,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fetch:
    """Asks the last stage for more candidates of some outputs of an earlier step."""

    number: int  # the step's
    outputs: tuple[int, ...]  # indices into its outputs
    k: int

    def encode(self) -> bytes:
        """The message: the number of candidates stands where a step's number of tokens does."""
        body = np.array(self.outputs, "<i4").tobytes()
        return HEADER.pack(MAGIC | Kind.FETCH, self.number, len(self.outputs), self.k, 0, 0, 0) + body

    @staticmethod
    def decode(message: bytes) -> Fetch:
        """The request of a message whose kind is FETCH."""
        _, number, count, k, *_ = HEADER.unpack_from(message)
        outputs = np.frombuffer(message, "<i4", offset=HEADER.size)
        if len(outputs) != count:
            raise ValueError(f"a fetch message of {len(message)} bytes does not match its header")
        return Fetch(number, tuple(outputs.tolist()), k)


def stop_message(exit_code: int) -> bytes:
    """The message after which every rank leaves with `exit_code`."""
    return HEADER.pack(MAGIC | Kind.STOP, exit_code, 0, 0, 0, 0, 0)


def kind_of(message: bytes) -> Kind:
    """What a message is; ValueError if it is none of ours."""
    if len(message) < HEADER.size:
        raise ValueError(f"a step message of {len(message)} bytes is shorter than its header")
    magic, *_ = HEADER.unpack_from(message)
    if magic & ~0xFF != MAGIC or magic & 0xFF not in tuple(Kind):
        raise ValueError(f"a step message starts with {magic:#010x}")
    return Kind(magic & 0xFF)


def exit_code_of(message: bytes) -> int:
    """The exit code that a STOP message carries."""
    return int(HEADER.unpack_from(message)[1])
