"""The one message that a step needs: what every rank must know to compute its part, packed as integers.

A step is complete in itself: block tables, positions and token ids travel in it, so a follower keeps no state
about sequences. The layout, all little-endian 32-bit words: a 24-byte header (kind and magic, step number, parts,
tokens, table entries, seen ids), then for each part its ten fields (start, tokens, blocks, score_k, successor,
sample_k with logprobs + 1 in its highest byte, seen ids, hidden, and as floats temperature and penalty), then all
tokens, block tables and seen ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpillm.engine.sampler import inverse_temperature
from mpillm.kernels import KV_BLOCK
from mpillm.model.decoder import Batch

Ints = NDArray[np.int32]

HEADER = struct.Struct("<6I")
MAGIC = 0x6D706900  # "mpi" and a byte for the kind
FIELDS = 10
NO_TARGET = -1


class Kind(IntEnum):
    """What a message asks of the ranks."""

    STEP = 0  # compute this batch
    FETCH = 1  # send more candidates of a step's outputs
    STOP = 2  # leave; the step number is the exit code


class Hidden(IntEnum):
    """Which final hidden states a part wants back (for embeddings)."""

    NONE = 0
    LAST = 1
    ALL = 2


NO_IDS = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's part of a step: tokens `start` to `start + len(tokens)` of it."""

    start: int
    tokens: Ints
    blocks: Ints  # the sequence's block table, as far as these tokens reach
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
    part: int  # index of the part, whose penalty applies if `penalised`
    penalised: bool
    sampled: bool  # a token is drawn from it, so more candidates may be asked for
    normalised: bool  # probabilities are wanted, so both normalisers must be known


@dataclass(frozen=True)
class Step:
    """A batch of parts."""

    number: int
    parts: tuple[Part, ...]

    @cached_property
    def outputs(self) -> list[Output]:
        """The outputs in the order of all replies: for each part its scored rows, then its sampled row."""
        return list(self._outputs())

    def _outputs(self) -> Iterator[Output]:
        row = 0
        for index, part in enumerate(self.parts):
            count = len(part.tokens)
            if part.score_k >= 0:
                targets = [*part.tokens[1:].tolist(), part.successor]
                for i, target in enumerate(targets):
                    if target != NO_TARGET:
                        yield Output(row + i, part.score_k, target, 1.0, index, False, False, True)
            last = row + count - 1
            if part.sample_k > 0:
                inv_t = inverse_temperature(part.temperature)
                penalised = part.penalty != 1.0
                wanted = part.logprobs >= 0
                if penalised and wanted:
                    # Log-probabilities are of the model's own distribution: look at the row as it is, too.
                    yield Output(last, max(part.logprobs, 1), NO_TARGET, 1.0, index, False, False, True)
                normalised = wanted or part.temperature > 0
                yield Output(last, part.sample_k, NO_TARGET, inv_t, index, penalised, True, normalised)
            row += count

    def hidden_rows(self) -> Ints:
        """Rows of the batch whose final hidden state is wanted, ascending."""
        rows: list[int] = []
        row = 0
        for part in self.parts:
            count = len(part.tokens)
            if part.hidden is Hidden.ALL:
                rows.extend(range(row, row + count))
            elif part.hidden is Hidden.LAST:
                rows.append(row + count - 1)
            row += count
        return np.array(rows, np.int32)

    def batch(self) -> Batch:
        """The arrays that the decoder works on."""
        tokens = np.concatenate([part.tokens for part in self.parts])
        counts = np.array([len(part.tokens) for part in self.parts], np.int32)
        starts = np.array([part.start for part in self.parts], np.int32)
        rows = np.cumsum(counts, dtype=np.int32) - counts
        positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(starts - rows, counts)
        sizes = np.array([len(part.blocks) for part in self.parts], np.int32)
        begins = np.cumsum(sizes, dtype=np.int32) - sizes
        table_start = np.repeat(begins, counts)
        table = np.concatenate([part.blocks for part in self.parts])
        return Batch(
            tokens=tokens,
            positions=positions,
            table=table,
            table_start=table_start,
            block=table[table_start + positions // KV_BLOCK],
            offset=positions % KV_BLOCK,
        )

    def encode(self) -> bytes:
        """The message."""
        fields = np.array([_fields(part) for part in self.parts], np.int32)
        floats = [(part.temperature, part.penalty) for part in self.parts]
        fields[:, 8:] = np.array(floats, np.float32).view(np.int32)
        tokens = [part.tokens for part in self.parts]
        blocks = [part.blocks for part in self.parts]
        seen = [part.seen for part in self.parts]
        body = np.concatenate([fields.ravel(), *tokens, *blocks, *seen])
        sizes = (sum(map(len, group)) for group in (tokens, blocks, seen))
        return (
            HEADER.pack(MAGIC | Kind.STEP, self.number, len(self.parts), *sizes)
            + body.astype("<i4").tobytes()
        )

    @staticmethod
    def decode(message: bytes) -> Step:
        """The step of a message whose kind is STEP."""
        _, number, parts, tokens, table, seen = HEADER.unpack_from(message)
        words = np.frombuffer(message, "<i4", offset=HEADER.size).astype(np.int32, copy=False)
        if len(words) != parts * FIELDS + tokens + table + seen:
            raise ValueError(f"a step message of {len(message)} bytes does not match its header")
        fields = words[: parts * FIELDS].reshape(parts, FIELDS)
        _check(fields, tokens, table, seen)
        at_tokens = parts * FIELDS
        at_table = at_tokens + tokens
        at_seen = at_table + table
        decoded = []
        for row in fields:
            start, n_tokens, n_blocks, score_k, successor, packed_k, n_seen, hidden = row[:8].tolist()
            temperature, penalty = row[8:].view(np.float32).tolist()
            decoded.append(
                Part(
                    start=start,
                    tokens=words[at_tokens : at_tokens + n_tokens],
                    blocks=words[at_table : at_table + n_blocks],
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
            at_tokens, at_table, at_seen = at_tokens + n_tokens, at_table + n_blocks, at_seen + n_seen
        return Step(number, tuple(decoded))


def _check(fields: Ints, tokens: int, table: int, seen: int) -> None:
    """ValueError unless the parts' sizes make up the header's, and each part's tokens lie in its blocks."""
    starts, counts = fields[:, 0].astype(np.int64), fields[:, [1, 2, 6]].astype(np.int64)
    if not len(fields) or counts.min() < 0 or counts.sum(axis=0).tolist() != [tokens, table, seen]:
        raise ValueError("a step message's parts do not make up what its header says")
    ends = starts + counts[:, 0]
    if starts.min() < 0 or counts[:, 0].min() < 1 or (ends > counts[:, 1] * KV_BLOCK).any():
        raise ValueError("a step message has a part whose tokens lie outside its blocks")


def _fields(part: Part) -> tuple[int, ...]:
    """A part's fields; the floats' bits go where the zeros are."""
    packed_k = part.sample_k | (part.logprobs + 1) << 24
    sizes = len(part.tokens), len(part.blocks), len(part.seen)
    return part.start, *sizes[:2], part.score_k, part.successor, packed_k, sizes[2], part.hidden, 0, 0


@dataclass(frozen=True, slots=True)
class Fetch:
    """Asks the last stage for more candidates of some outputs of an earlier step."""

    number: int  # the step's
    outputs: tuple[int, ...]  # indices into its outputs
    k: int

    def encode(self) -> bytes:
        """The message: the number of candidates stands where a step's number of tokens does."""
        body = np.array(self.outputs, "<i4").tobytes()
        return HEADER.pack(MAGIC | Kind.FETCH, self.number, len(self.outputs), self.k, 0, 0) + body

    @staticmethod
    def decode(message: bytes) -> Fetch:
        """The request of a message whose kind is FETCH."""
        _, number, count, k, _, _ = HEADER.unpack_from(message)
        outputs = np.frombuffer(message, "<i4", offset=HEADER.size)
        if len(outputs) != count:
            raise ValueError(f"a fetch message of {len(message)} bytes does not match its header")
        return Fetch(number, tuple(outputs.tolist()), k)


def stop_message(exit_code: int) -> bytes:
    """The message after which every rank leaves with `exit_code`."""
    return HEADER.pack(MAGIC | Kind.STOP, exit_code, 0, 0, 0, 0)


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
