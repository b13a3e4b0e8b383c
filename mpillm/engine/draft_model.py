"""A draft model: a small model with the same tokenizer, whose draws are drafts for the large model.

It draws with the settings and random numbers of the large model, so both draw the same token, at any temperature, if
their distributions are similar. Its weights stay in memory, and it has its own KV cache.
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

ROWS = 512  # rows of a step, at most
KEPT = 0.9  # the weight of earlier steps in the moving average of a step's time


@dataclass(eq=False)
class _Cached:
    """The cache of a sequence: the keys and values of its first `known` tokens, and of drafts after them."""

    tables: list[BlockTable]
    known: int = 0
    drafted: list[int] = field(default_factory=list)
    named: int = 0  # the number of first blocks that are registered by their content


@dataclass(eq=False)
class _Drafting:
    """A sequence whose tokens are being drafted."""

    sequence: Sequence
    cached: _Cached
    maximum: int
    constraint: Constraint | None
    tokens: list[int]  # known tokens, and drafts after them
    computed: int
    ended: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether another token is to be drafted."""
        return not self.ended and self.count < self.maximum

    @property
    def count(self) -> int:
        """The number of drafted tokens."""
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
        """`step` computes a step of the draft model; its cache has `n_blocks` blocks in each of `groups` groups.

        The model reads at most `longest` tokens of a sequence. `vocab` and `large_vocab` are the sizes of both models'
        vocabularies, which may be padded differently.
        """
        self._large_vocab = large_vocab
        self.seconds = 0.0  # the mean time of recent steps that drew a token for each of their sequences
        self._step, self._vocab, self._longest, self._groups = step, vocab, longest, groups
        self._pool = BlockPool(n_blocks)
        self._cached: dict[Sequence, _Cached] = {}  # the least recently used first
        self._number = 0

    def draft(self, asked: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """Draft up to the asked number of tokens for each sequence; none if the cache has no room for it."""
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
        """Release the blocks of a sequence, if it has any."""
        if (cached := self._cached.pop(sequence, None)) is not None:
            for table in cached.tables:
                self._pool.release(table.blocks)

    def clear(self) -> None:
        """Release the blocks of all sequences."""
        for sequence in list(self._cached):
            self.forget(sequence)

    def _begin(self, sequence: Sequence, maximum: int, others: dict[Sequence, list[int]]) -> _Drafting | None:
        """Prepare a sequence; None if it is too long for the model, or the cache has no room beside `others`."""
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
        """Use the blocks that another sequence has computed."""
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
        """Register the full blocks of known tokens by their content."""
        for index in range(cached.named, cached.known // KV_BLOCK):
            key = sequence.block_key(index)
            for group, table in enumerate(cached.tables):
                self._pool.name(table.blocks[index], (group, key))
            cached.named = index + 1

    def _compute(self, drafting: list[_Drafting]) -> None:
        """Compute a step with as many of the sequences' tokens as fit into its rows."""
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
        """Draw a token as for the large model; if the candidates do not decide it, take the likeliest."""
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
