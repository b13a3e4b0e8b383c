"""A draft model: a small model with the same tokenizer that says what a large one is likely to draw.

It draws as the large one does, with the same settings and the same random numbers: where both find the same tokens
likely, they draw the same ones, at any temperature. It is in memory, and has a KV cache of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpillm.engine.blocks import BlockPool, BlockTable
from mpillm.engine.chunks import drawn_from
from mpillm.engine.drafter import common
from mpillm.engine.reply import Reply, merge
from mpillm.engine.request import Constraint
from mpillm.engine.sampler import Candidates, draw
from mpillm.engine.sequence import Sequence
from mpillm.engine.step import Chunk, Step, Table
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_for

ROWS = 512  # of a step, at most
KEPT = 0.9  # of the mean of a step's seconds, what a step leaves of the earlier ones


@dataclass(eq=False)
class _Cached:
    """What the cache has of a sequence: its first `known` tokens, and what was drafted behind them."""

    tables: list[BlockTable]
    known: int = 0
    drafted: list[int] = field(default_factory=list)
    named: int = 0  # its first blocks that can be found by their content


@dataclass(eq=False)
class _Drafting:
    """A sequence whose tokens are being drafted."""

    sequence: Sequence
    cached: _Cached
    maximum: int
    constraint: Constraint | None
    tokens: list[int]  # known ones, and those that were drafted
    computed: int
    ended: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether another token is wanted."""
        return not self.ended and self.count < self.maximum

    @property
    def count(self) -> int:
        """How many tokens were drafted."""
        return len(self.tokens) - len(self.sequence.tokens)


class DraftModel:
    """Drafts for several sequences at once."""

    def __init__(
        self,
        step: Callable[[Step], Reply | None],
        vocab: int,
        large_vocab: int,
        longest: int,
        n_blocks: int,
        groups: int,
    ) -> None:
        """`step` computes a step of the model, whose cache has so many groups of layers.

        It can read `longest` tokens of a sequence; vocabularies of models that share a tokenizer may be padded unlike.
        """
        self._large_vocab = large_vocab
        self.seconds = 0.0  # of a step that draws a token for each of its sequences, of late
        self._step, self._vocab, self._longest, self._groups = step, vocab, longest, groups
        self._pool = BlockPool(n_blocks)
        self._cached: dict[Sequence, _Cached] = {}  # the longest unused first
        self._number = 0

    def draft(self, asked: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """Up to so many tokens that may follow each of some sequences; none where there is no room."""
        by_sequence: dict[Sequence, list[int]] = {sequence: [] for sequence, _ in asked}
        all_drafting = [
            one for sequence, maximum in asked if (one := self._begin(sequence, maximum, by_sequence))
        ]
        while drafting := [one for one in all_drafting if one.goes_on]:
            self._compute(drafting)
        for one in all_drafting:
            cached, sequence = one.cached, one.sequence
            known = len(sequence.tokens)
            by_sequence[sequence] = one.tokens[known:]
            cached.known, cached.drafted = min(one.computed, known), one.tokens[known : one.computed]
            self._name(sequence, cached)
        return list(by_sequence.values())

    def forget(self, sequence: Sequence) -> None:
        """Release what is kept of a sequence, if anything."""
        if (cached := self._cached.pop(sequence, None)) is not None:
            for table in cached.tables:
                self._pool.release(table.blocks)

    def clear(self) -> None:
        """Release what is kept of all sequences."""
        for sequence in list(self._cached):
            self.forget(sequence)

    def _begin(self, sequence: Sequence, maximum: int, others: dict[Sequence, list[int]]) -> _Drafting | None:
        """None if the model cannot read the sequence, or the cache has no room beside `others`."""
        tokens, known = sequence.tokens, len(sequence.tokens)
        cached = self._cached.pop(sequence, None)
        if cached is None:
            cached = _Cached([BlockTable() for _ in range(self._groups)])
            self._share(sequence, cached)
        self._cached[sequence] = cached
        new = tokens[cached.known :]
        if known + maximum > self._longest or max(new, default=0) >= self._vocab:
            return None
        computed = cached.known + common(new, cached.drafted)
        end = blocks_for(known + maximum)
        missing = sum(end - table.end for table in cached.tables)
        for other in [one for one in self._cached if one not in others]:
            if self._pool.free >= missing:
                break
            self.forget(other)
        if self._pool.free < missing:
            return None
        for table in cached.tables:
            table.blocks.extend(self._pool.acquire() for _ in range(end - table.end))
        constraint = None if sequence.constraint is None else sequence.constraint.copy()
        return _Drafting(sequence, cached, maximum, constraint, list(tokens), min(computed, known - 1))

    def _share(self, sequence: Sequence, cached: _Cached) -> None:
        """Begin behind the blocks that another sequence has computed."""
        for index in range((len(sequence.tokens) - 1) // KV_BLOCK):
            key = sequence.block_key(index)
            if not all((group, key) in self._pool for group in range(self._groups)):
                break
            for group, table in enumerate(cached.tables):
                block = self._pool.share((group, key))
                assert block is not None
                table.blocks.append(block)
            cached.named = index + 1
            cached.known = cached.named * KV_BLOCK

    def _name(self, sequence: Sequence, cached: _Cached) -> None:
        """Let the full blocks of known tokens be found by their content."""
        for index in range(cached.named, cached.known // KV_BLOCK):
            key = sequence.block_key(index)
            for group, table in enumerate(cached.tables):
                self._pool.name(table.blocks[index], (group, key))
            cached.named = index + 1

    def _compute(self, drafting: list[_Drafting]) -> None:
        """A step of so many of the sequences' tokens as it has rows for."""
        budget, chosen, chunks = ROWS, list[_Drafting](), list[Chunk]()
        for one in drafting:
            count = min(len(one.tokens) - one.computed, budget)
            if count:
                chosen.append(one)
                chunks.append(self._chunk(one, count))
                budget -= count
        step = Step(self._number, tuple(chunks))
        self._number += 1
        begin = time.perf_counter()
        reply = self._step(step)
        seconds = time.perf_counter() - begin
        if all(len(chunk.tokens) == 1 for chunk in chunks):
            self.seconds = KEPT * self.seconds + (1 - KEPT) * seconds if self.seconds else seconds
        assert reply is not None
        drawn = iter(merge([reply], step.outputs, [self._vocab]))
        for one, chunk in zip(chosen, chunks, strict=True):
            one.computed += len(chunk.tokens)
            if one.computed == len(one.tokens):
                self._take(one, next(drawn))

    def _chunk(self, one: _Drafting, count: int) -> Chunk:
        request = one.sequence.request
        end = one.computed + count
        wanted: dict[str, Any] = {}
        if end == len(one.tokens):
            allowed = request.allowed if one.constraint is None else one.constraint.allowed()
            words = -(-self._vocab // 32)
            if allowed is not None and len(allowed) < words:  # this model's vocabulary is padded further
                allowed = np.pad(allowed, (0, words - len(allowed)))
            wanted = {**drawn_from(request, one.tokens, allowed), "logprobs": -1}
        last = blocks_for(end)
        tables = tuple(Table(0, np.array(table.blocks[:last], np.int32)) for table in one.cached.tables)
        tokens = np.array(one.tokens[one.computed : end], np.int32)
        return Chunk(start=one.computed, tokens=tokens, tables=tables, **wanted)

    def _take(self, one: _Drafting, found: Candidates) -> None:
        """Draw a token as the large model's would be drawn; what cannot be decided is taken for the likeliest."""
        request = one.sequence.request
        u = one.sequence.uniform(one.count) if request.temperature > 0 else 0.0
        if not found.finite:
            one.ended = True
            return
        token = int(found.ids[draw(found, request, u) or 0])
        one.ended = token in request.stop_ids or token >= self._large_vocab
        if one.ended:
            return
        if one.constraint is not None:
            if not one.constraint.accepts(token):
                one.ended = True
                return
            one.constraint.push(token)
            one.ended = one.constraint.ended
        one.tokens.append(token)
