"""The messages that the leader sends to the ranks of its replica: steps, requests for more candidates, the end.

All words are little-endian and have 32 bits. A message begins with a header of ten words, `HEADER`: a magic number with
the kind in its lowest byte, the number of the step, and eight sizes that depend on the kind.

A step contains block tables, positions and token ids, so followers keep no state about sequences. Its sizes are the
numbers of chunks, tokens, table entries, seen ids, groups of layers, shifted ids, masks, and words of a mask. After the
header come
- the fields of each chunk (`_fields`; temperature and penalty are floats), which end with the index of the first block
  and the number of blocks in each group;
- all tokens;
- the block tables by chunk, and by group within a chunk;
- the seen ids;
- the shifted ids, each with the floats that are added to its logit before and after the penalty;
- the masks. Chunks with the same mask share it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from mpillm.engine.step import NO_IDS, NO_SHIFTS, Chunk, Hidden, Ints, Shifts, Step, Table
from mpillm.kernels import KV_BLOCK

HEADER = struct.Struct("<10I")
MAGIC = 0x6D706900  # "mpi" and a byte for the kind
FIELDS = 18  # words of a chunk, without the two for each group
NO_MASK = -1


class Kind(IntEnum):
    """The kind of a message."""

    STEP = 0
    FETCH = 1
    STOP = 2


@dataclass(frozen=True, slots=True)
class Fetch:
    """Asks the last stage for more candidates of some outputs of an earlier step."""

    number: int  # the number of the step
    outputs: tuple[int, ...]  # indices into the step's outputs
    k: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the run on every rank with this exit code."""

    exit_code: int


def encode(message: Step | Fetch | Stop) -> bytes:
    """Return the bytes of a message."""
    if isinstance(message, Step):
        return _encode_step(message)
    if isinstance(message, Fetch):
        sizes = [len(message.outputs), message.k, *[0] * 6]
        head = HEADER.pack(MAGIC | Kind.FETCH, message.number, *sizes)
        return head + np.array(message.outputs, "<i4").tobytes()
    return HEADER.pack(MAGIC | Kind.STOP, message.exit_code, *[0] * 8)


def decode(data: bytes) -> Step | Fetch | Stop:
    """Return the message in `data`; raises ValueError if it is not a valid message."""
    if len(data) < HEADER.size:
        raise ValueError(f"a message of {len(data)} bytes is shorter than its header")
    magic, number, *sizes = HEADER.unpack_from(data)
    if magic & ~0xFF != MAGIC or magic & 0xFF not in tuple(Kind):
        raise ValueError(f"a message starts with {magic:#010x}")
    kind = Kind(magic & 0xFF)
    if kind is Kind.STOP:
        return Stop(number)
    words = np.frombuffer(data, "<i4", offset=HEADER.size).astype(np.int32, copy=False)
    if kind is Kind.STEP:
        return _decode_step(number, sizes, words)
    outputs, k, *_ = sizes
    if len(words) != outputs:
        raise ValueError(f"a message of {len(data)} bytes does not match its header")
    return Fetch(number, tuple(words.tolist()), k)


def _encode_step(step: Step) -> bytes:
    masks: dict[bytes, int] = {}
    numbers = [
        masks.setdefault(chunk.allowed.tobytes(), len(masks)) if len(chunk.allowed) else NO_MASK
        for chunk in step.chunks
    ]
    fields = np.array(
        [_fields(chunk, number) for chunk, number in zip(step.chunks, numbers, strict=True)], np.int32
    )
    floats = [(chunk.temperature, chunk.penalty) for chunk in step.chunks]
    fields[:, FIELDS - 2 : FIELDS] = np.array(floats, np.float32).view(np.int32)
    tokens = [chunk.tokens for chunk in step.chunks]
    blocks = [table.blocks for chunk in step.chunks for table in chunk.tables]
    seen = [chunk.seen for chunk in step.chunks]
    shifts = [_shift_words(chunk.shifts) for chunk in step.chunks]
    allowed = [np.frombuffer(mask, np.int32) for mask in masks]
    body = np.concatenate([fields.ravel(), *tokens, *blocks, *seen, *shifts, *allowed])
    sizes = (sum(map(len, arrays)) for arrays in (tokens, blocks, seen))
    groups = len(step.chunks[0].tables)
    shifted, words = sum(map(len, shifts)) // 3, len(allowed[0]) if allowed else 0
    head = HEADER.pack(
        MAGIC | Kind.STEP, step.number, len(step.chunks), *sizes, groups, shifted, len(masks), words
    )
    return head + body.astype("<i4").tobytes()


def _fields(chunk: Chunk, mask: int) -> tuple[int, ...]:
    """Return the fields of a chunk, with zeros in place of the floats; `mask` is the number of its mask."""
    tables = (number for table in chunk.tables for number in (table.first, len(table.blocks)))
    return (
        chunk.start, len(chunk.tokens), chunk.slot, chunk.score_k, chunk.successor, chunk.sample_k, chunk.logprobs,
        len(chunk.seen), chunk.hidden, len(chunk.shifts.ids), mask, chunk.loads, chunk.saves, chunk.second,
        chunk.adapter, chunk.long, 0, 0, *tables,
    )  # fmt: skip


def _decode_step(number: int, sizes: list[int], words: Ints) -> Step:
    """Return the step with these sizes in its header and `words` after it."""
    chunks, tokens, table, seen, groups, shifted, n_masks, mask_words = sizes
    width = FIELDS + 2 * groups
    lengths = [chunks * width, tokens, table, seen, 3 * shifted, n_masks * mask_words]
    if len(words) != sum(lengths):
        raise ValueError(f"a step message of {len(words)} words does not match its header")
    first, *lists = np.split(words, np.cumsum(lengths[:-1]))
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
            loads, saves, second, adapter, long,
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
                second=second,
                score_k=score_k,
                successor=successor,
                sample_k=sample_k,
                logprobs=logprobs,
                temperature=temperature,
                penalty=penalty,
                seen=all_seen(n_seen),
                shifts=_shifts(all_shifts(3 * n_shifts)) if n_shifts else NO_SHIFTS,
                allowed=NO_IDS if mask == NO_MASK else masks[mask],
                hidden=Hidden(hidden),
                adapter=adapter,
                long=bool(long),
            )
        )
    return Step(number, tuple(decoded))


class _Taker:
    """Reads an array piece by piece."""

    def __init__(self, words: Ints) -> None:
        self._words, self._at = words, 0

    def __call__(self, count: int) -> Ints:
        self._at += count
        return self._words[self._at - count : self._at]


def _check(fields: Ints, totals: tuple[int, ...], masks: int) -> None:
    """Raise ValueError unless the chunks' sizes add up to the header's, and each chunk's tokens lie in its blocks.

    `totals` are the header's numbers of tokens, table entries, seen ids and shifted ids.
    """
    exact = fields.astype(np.int64)
    starts, counts, seen, shifts, mask, long = (exact[:, at] for at in (0, 1, 7, 9, 10, 15))
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
    if ((long != 0) & (long != 1)).any():
        raise ValueError("a step message has a flag that is neither 0 nor 1")


def _shift_words(shifts: Shifts) -> Ints:
    """Return shifts as words [3 n]: each id is followed by its two floats."""
    words = np.stack([shifts.ids, shifts.before.view(np.int32), shifts.after.view(np.int32)], axis=1)
    return words.ravel()


def _shifts(words: Ints) -> Shifts:
    """Return the shifts that `_shift_words` wrote."""
    ids, before, after = np.ascontiguousarray(words.reshape(-1, 3).T)
    return Shifts(ids, before.view(np.float32), after.view(np.float32))
