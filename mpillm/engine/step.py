"""The one message that a step needs: what every rank must know to compute its chunk, packed as integers.

A step is complete in itself: block tables, positions and token ids travel in it, so a follower keeps no state
about sequences. The layout, all little-endian 32-bit words: a 40-byte header (kind and magic, step number, chunks,
tokens, table entries, seen ids, groups of layers, shifted ids, masks, words of a mask); for each chunk its fields (see
`_fields`; temperature and penalty are floats), and for each group the number of its first block and how many it has;
then all tokens, block tables (chunk by chunk, and by group in each), seen ids, shifted ids with what is added to their
logits before and after the penalty (as floats), and masks. Chunks with the same mask share it.
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
from mpillm.model.batch import NO_ADAPTER, Batch
from mpillm.model.kv import GroupTables, StateMoves

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

HEADER = struct.Struct("<10I")
MAGIC = 0x6D706900  # "mpi" and a byte for the kind
FIELDS = 16  # of a chunk, and two more for each group
NO_TARGET = -1
NO_MASK = -1


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
    FIRST = 3


NO_IDS = np.empty(0, np.int32)


class Shifts(NamedTuple):
    """What is added to the logits of some ids that a token is drawn from, before and after the repetition penalty."""

    ids: Ints
    before: Floats
    after: Floats

    @property
    def words(self) -> Ints:
        """As they travel: an id and its two floats in a row [n, 3]."""
        return np.stack([self.ids, self.before.view(np.int32), self.after.view(np.int32)], axis=1)

    @staticmethod
    def of(words: Ints) -> Shifts:
        """What `words` gives."""
        ids, before, after = np.ascontiguousarray(words.reshape(-1, 3).T)
        return Shifts(ids, before.view(np.float32), after.view(np.float32))


NO_SHIFTS = Shifts(NO_IDS, NO_IDS.view(np.float32), NO_IDS.view(np.float32))


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
    loads: int = NO_SLOT  # the slot of saved states with which the sequence goes on
    saves: int = NO_SLOT  # the slot in which its states after the chunk are saved
    score_k: int = -1  # score each token's successor, with this many alternatives; -1: do not
    successor: int = NO_TARGET  # the token after the last one, if known
    sample_k: int = 0  # candidates wanted for the token after the last one; 0: none
    logprobs: int = -1  # log-probabilities wanted of that token and of so many alternatives; -1: of none
    temperature: float = 0.0
    penalty: float = 1.0
    seen: Ints = field(default_factory=lambda: NO_IDS)  # distinct ids that the penalty is for
    shifts: Shifts = NO_SHIFTS
    allowed: Ints = field(
        default_factory=lambda: NO_IDS
    )  # a bit for each id that may be drawn; empty: all may
    hidden: Hidden = Hidden.NONE
    adapter: int = NO_ADAPTER  # the number of the adapter that the sequence has

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
        """Rows of the batch whose final hidden state is wanted, ascending."""
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
        counts = np.array([len(chunk.tokens) for chunk in self.chunks], np.int32)
        starts = np.array([chunk.start for chunk in self.chunks], np.int32)
        rows = np.cumsum(counts, dtype=np.int32) - counts
        positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(starts - rows, counts)
        adapters = np.array([chunk.adapter for chunk in self.chunks], np.int32)
        tables = zip(*(chunk.tables for chunk in self.chunks), strict=True)
        return Batch(
            tokens=tokens,
            positions=positions,
            offset=positions % KV_BLOCK,
            groups=tuple(_group_tables(group, counts, positions) for group in tables),
            first_rows=rows,
            slots=np.array([chunk.slot for chunk in self.chunks], np.int32),
            states=self._state_moves(),
            adapters=np.repeat(adapters, counts) if adapters.any() else None,
        )

    def _state_moves(self) -> StateMoves:
        chunks = [chunk for chunk in self.chunks if chunk.slot != NO_SLOT]
        return StateMoves(
            fresh=[chunk.slot for chunk in chunks if chunk.start == 0],
            loaded=[(chunk.slot, chunk.loads) for chunk in chunks if chunk.loads != NO_SLOT],
            saved=[(chunk.saves, chunk.slot) for chunk in chunks if chunk.saves != NO_SLOT],
        )

    def encode(self) -> bytes:
        """The message."""
        masks: dict[bytes, int] = {}
        numbers = [
            masks.setdefault(chunk.allowed.tobytes(), len(masks)) if len(chunk.allowed) else NO_MASK
            for chunk in self.chunks
        ]
        fields = np.array(
            [_fields(chunk, number) for chunk, number in zip(self.chunks, numbers, strict=True)], np.int32
        )
        floats = [(chunk.temperature, chunk.penalty) for chunk in self.chunks]
        fields[:, FIELDS - 2 : FIELDS] = np.array(floats, np.float32).view(np.int32)
        tokens = [chunk.tokens for chunk in self.chunks]
        blocks = [table.blocks for chunk in self.chunks for table in chunk.tables]
        seen = [chunk.seen for chunk in self.chunks]
        shifts = [chunk.shifts.words.ravel() for chunk in self.chunks]
        allowed = [np.frombuffer(mask, np.int32) for mask in masks]
        body = np.concatenate([fields.ravel(), *tokens, *blocks, *seen, *shifts, *allowed])
        sizes = (sum(map(len, arrays)) for arrays in (tokens, blocks, seen))
        groups = len(self.chunks[0].tables)
        shifted, words = sum(map(len, shifts)) // 3, len(allowed[0]) if allowed else 0
        head = HEADER.pack(
            MAGIC | Kind.STEP, self.number, len(self.chunks), *sizes, groups, shifted, len(masks), words
        )
        return head + body.astype("<i4").tobytes()

    @staticmethod
    def decode(message: bytes) -> Step:
        """The step of a message whose kind is STEP."""
        _, number, chunks, tokens, table, seen, groups, shifted, n_masks, mask_words = HEADER.unpack_from(
            message
        )
        words = np.frombuffer(message, "<i4", offset=HEADER.size).astype(np.int32, copy=False)
        width = FIELDS + 2 * groups
        sizes = [chunks * width, tokens, table, seen, 3 * shifted, n_masks * mask_words]
        if len(words) != sum(sizes):
            raise ValueError(f"a step message of {len(message)} bytes does not match its header")
        first, *lists = np.split(words, np.cumsum(sizes[:-1]))
        fields = first.reshape(chunks, width)
        _check(fields, (tokens, table, seen, shifted), n_masks)
        masks = lists.pop().reshape(n_masks, mask_words)
        if len({mask.tobytes() for mask in masks}) < n_masks or (mask_words and not n_masks):
            raise ValueError("a step message has the same mask twice")
        all_tokens, all_blocks, all_seen, all_shifts = map(_Taker, lists)
        decoded = []
        for row in fields:
            (
                start, n_tokens, slot, score_k, successor, sample_k, logprobs, n_seen, hidden, n_shifts, mask,
                loads, saves, adapter,
            ) = row[: FIELDS - 2].tolist()  # fmt: skip
            temperature, penalty = row[FIELDS - 2 : FIELDS].view(np.float32).tolist()
            tables = row[FIELDS:].reshape(groups, 2).tolist()
            decoded.append(
                Chunk(
                    start=start,
                    tokens=all_tokens(n_tokens),
                    tables=tuple(Table(first, all_blocks(n_blocks)) for first, n_blocks in tables),
                    slot=slot,
                    loads=loads,
                    saves=saves,
                    score_k=score_k,
                    successor=successor,
                    sample_k=sample_k,
                    logprobs=logprobs,
                    temperature=temperature,
                    penalty=penalty,
                    seen=all_seen(n_seen),
                    shifts=Shifts.of(all_shifts(3 * n_shifts)) if n_shifts else NO_SHIFTS,
                    allowed=NO_IDS if mask == NO_MASK else masks[mask],
                    hidden=Hidden(hidden),
                    adapter=adapter,
                )
            )
        return Step(number, tuple(decoded))


class _Taker:
    """Takes an array apart from its beginning."""

    def __init__(self, words: Ints) -> None:
        self._words, self._at = words, 0

    def __call__(self, count: int) -> Ints:
        self._at += count
        return self._words[self._at - count : self._at]


def _group_tables(tables: Sequence[Table], counts: Ints, positions: Ints) -> GroupTables:
    """The tables of one group, one after the other, behind padding: kernels count a sequence's blocks from its first
    one, also from where that is no longer kept."""
    sizes = np.array([len(table.blocks) for table in tables], np.int32)
    begins = np.cumsum(sizes, dtype=np.int32) - sizes - np.array([table.first for table in tables], np.int32)
    padding = max(-int(begins.min()), 0)
    table = np.concatenate([np.zeros(padding, np.int32), *(table.blocks for table in tables)])
    table_start = np.repeat(begins + np.int32(padding), counts)
    return GroupTables(table, table_start, table[table_start + positions // KV_BLOCK], padding)


def _check(fields: Ints, totals: tuple[int, ...], masks: int) -> None:
    """ValueError unless the chunks' sizes sum up to the header's, and each chunk's tokens lie in its blocks.

    `totals` are those of tokens, table entries, seen ids and shifted ids.
    """
    exact = fields.astype(np.int64)
    starts, counts, seen, shifts, mask = (exact[:, at] for at in (0, 1, 7, 9, 10))
    firsts, blocks = exact[:, FIELDS::2], exact[:, FIELDS + 1 :: 2]
    sums = tuple(int(sizes.sum()) for sizes in (counts, blocks, seen, shifts))
    negative = any((sizes < 0).any() for sizes in (counts, firsts, blocks, seen, shifts, mask - NO_MASK))
    used = list(dict.fromkeys(mask[mask != NO_MASK].tolist()))
    if not len(fields) or negative or sums != totals or used != list(range(masks)):
        raise ValueError("the chunks of a step message do not match its header")
    first, last = starts[:, None], (starts + counts)[:, None] - 1
    outside = (firsts * KV_BLOCK > first) | (last >= (firsts + blocks) * KV_BLOCK)
    if starts.min() < 0 or counts.min() < 1 or outside.any():
        raise ValueError("a step message has a chunk whose tokens lie outside its blocks")


def _fields(chunk: Chunk, mask: int) -> tuple[int, ...]:
    """The fields of a chunk; `mask` is the number of its mask. The zeros are replaced by the bits of the floats."""
    tables = (number for table in chunk.tables for number in (table.first, len(table.blocks)))
    return (
        chunk.start, len(chunk.tokens), chunk.slot, chunk.score_k, chunk.successor, chunk.sample_k, chunk.logprobs,
        len(chunk.seen), chunk.hidden, len(chunk.shifts.ids), mask, chunk.loads, chunk.saves, chunk.adapter, 0, 0,
        *tables,
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
        return HEADER.pack(MAGIC | Kind.FETCH, self.number, len(self.outputs), self.k, *[0] * 6) + body

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
    return HEADER.pack(MAGIC | Kind.STOP, exit_code, *[0] * 8)


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
