"""Makes the chunks of a sequence in a step: one of its next tokens, and one for each draft after them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mpillm.engine.adjust import shifts
from mpillm.engine.request import Request
from mpillm.engine.sampler import candidates_wanted, used_temperature
from mpillm.engine.sequence import Sequence
from mpillm.engine.step import NO_IDS, NO_SECOND, NO_TARGET, Chunk, Hidden, Ints, Table
from mpillm.model.cache_layout import blocks_for


def chunks_of(sequence: Sequence, count: int) -> Iterator[Chunk]:
    """Yield the chunk of the next `count` tokens of a sequence, then those of its drafts."""
    request, tokens = sequence.request, sequence.tokens
    start, end = sequence.computed, sequence.computed + count
    last = blocks_for(end + len(sequence.drafts))
    tables = tuple(
        [
            Table(table.first, np.array(table.blocks[: last - table.first], np.int32))
            for table in sequence.tables
        ]
    )
    wanted: dict[str, Any] = {}
    if request.prompt_logprobs is not None:
        wanted |= _scored(sequence, end)
    if request.kind == "embed":
        wanted["hidden"] = _hidden(sequence, end)
    if not request.only_reads and end == len(tokens):
        constraint = sequence.constraint
        wanted |= drawn_from(request, tokens, request.allowed if constraint is None else constraint.allowed())
    yield Chunk(
        start=start,
        tokens=np.array(tokens[start:end], np.int32),
        tables=tables,
        slot=sequence.slot,
        loads=sequence.loads,
        saves=sequence.saves,
        second=NO_SECOND if request.second is None else request.second,
        adapter=request.adapter,
        long=sequence.long,
        **wanted,
    )
    known = tokens
    for at, (token, allowed, _) in enumerate(sequence.drafts, end):
        known = [*known, token]
        drawn = drawn_from(request, known, request.allowed if allowed is None else allowed)
        own = np.array([token], np.int32)
        yield Chunk(start=at, tokens=own, tables=tables, adapter=request.adapter, long=sequence.long, **drawn)


def drawn_from(request: Request, tokens: list[int], allowed: Ints | None) -> dict[str, Any]:
    """Return the fields of a chunk after which a token is drawn; `tokens` are prompt and answer up to there."""
    penalised = request.repetition_penalty != 1.0
    return {
        "sample_k": candidates_wanted(request),
        "logprobs": -1 if request.logprobs is None else request.logprobs,
        # Rounded to float32, as the followers read them.
        "temperature": used_temperature(request.temperature),
        "penalty": float(np.float32(request.repetition_penalty)),
        "seen": np.unique(np.array(tokens, np.int32)) if penalised else NO_IDS,
        "shifts": shifts(request, tokens),
        "allowed": NO_IDS if allowed is None else allowed,
    }


def _scored(sequence: Sequence, end: int) -> dict[str, Any]:
    """Return the fields of a chunk up to `end` whose prompt is scored; recomputed tokens are not scored again."""
    wanted, prompt = sequence.request.prompt_logprobs, sequence.request.prompt
    if not sequence.passed_over <= sequence.computed < len(prompt) - 1:
        return {}
    return {"score_k": wanted, "successor": prompt[end] if end < len(prompt) else NO_TARGET}


def _hidden(sequence: Sequence, end: int) -> Hidden:
    """Return which hidden states of the tokens up to `end` are wanted; recomputed tokens are not pooled again."""
    request, start = sequence.request, sequence.computed
    fresh = start >= sequence.passed_over
    if request.pooling == "mean":
        return Hidden.ALL if fresh else Hidden.NONE
    if request.pooling == "cls":
        return Hidden.FIRST if start == 0 and fresh else Hidden.NONE
    return Hidden.LAST if end == len(sequence.tokens) else Hidden.NONE
