"""Logit adjustments: biases, bans and penalties that a request applies before a token is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpillm.engine.request import Request
from mpillm.engine.sampler import FORBIDDEN
from mpillm.engine.step import NO_SHIFTS, Shifts


def shifts(request: Request, tokens: Sequence[int]) -> Shifts:
    """Return the ids, ascending, whose logits are shifted for the token after `tokens`, and the shifts.

    `tokens` are prompt and answer. `logit_bias` and bans (`FORBIDDEN`, for `min_tokens` and `bad_words`) apply before
    the repetition penalty; OpenAI's presence and frequency penalties, which count generated tokens only, after it.
    """
    if not request.shifts_logits:
        return NO_SHIFTS
    generated = list(tokens[len(request.prompt) :])
    before = dict(request.logit_bias)
    if len(generated) < request.min_tokens:
        before.update(dict.fromkeys(request.stop_ids, float(FORBIDDEN)))
    for *start, last in request.bad_words:
        if not start or generated[-len(start) :] == start:
            before[last] = float(FORBIDDEN)
    after: dict[int, float] = {}
    if request.presence_penalty or request.frequency_penalty:
        after = {
            token: -(request.presence_penalty + request.frequency_penalty * count)
            for token, count in Counter(generated).items()
        }
    ids = sorted(before.keys() | after.keys())
    if not ids:
        return NO_SHIFTS
    return Shifts(np.array(ids, np.int32), *(_values(table, ids) for table in (before, after)))


def _values(table: dict[int, float], ids: list[int]) -> NDArray[np.float32]:
    return np.array([table.get(id, 0.0) for id in ids], np.float32)


def bits(ids: frozenset[int], vocab: int) -> NDArray[np.int32]:
    """Return a mask of the vocabulary, in the form of `Chunk.allowed`, that allows only these ids."""
    allowed = np.zeros(-(-vocab // 32) * 32, np.uint8)
    allowed[list(ids)] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)
