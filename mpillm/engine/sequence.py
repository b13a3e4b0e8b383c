"""The state of one request while the engine computes it: its tokens, and its blocks and slot in the cache."""

from __future__ import annotations

import hashlib
import struct
import time
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpillm.engine import philox
from mpillm.engine.blocks import NO_SLOT, BlockTable, content_key, first_key
from mpillm.engine.drafter import Drafted, Drafter
from mpillm.engine.request import FinishedCompletion, PartialCompletion, Request, TopLogprobs
from mpillm.kernels import KV_BLOCK


class Sequence:
    """The state of one request while it runs; only the scheduler and the engine change it."""

    def __init__(self, request: Request, submitted: float = 0.0) -> None:
        self.request = request
        self._needs_all_rows = request.needs_all_rows
        self.tokens = list(request.prompt)
        self.constraint = None if request.constraint is None else request.constraint()
        self.number = 0  # the order of admission; older sequences have lower numbers
        self.computed = 0  # tokens whose keys and values are in the KV cache
        # The maximum of `computed` so far; after a preemption, tokens before it are computed again.
        self.reached = 0
        self.tables: list[BlockTable] = []  # one for each group of layers, all with the same end
        self.long = False  # uses LongRoPE's long factors
        self.slot = NO_SLOT  # the slot of its states
        self.loads = NO_SLOT  # the slot of the saved states with which the next chunk begins
        self.saves = NO_SLOT  # the slot in which the states after the next chunk are saved
        self.save_at = 0  # the position at which saved states would be useful to other sequences
        self._block_keys: list[bytes] = []
        self.named = 0  # the number of first blocks that have been registered by their content
        self.drafts: list[Drafted] = []  # drafts in the next step, or in the step in flight
        self.drafter: Drafter | None = None  # created when it is first needed
        self.in_flight = False  # it is in a step whose reply is outstanding
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.prompt_logprobs: list[float] = []
        self.prompt_top: list[TopLogprobs] = []
        self.pooled: NDArray[np.float64] | None = None
        self.finish_reason: Literal["stop", "length"] | None = None
        self.finite = True  # all outputs of the model so far were finite
        self.stop_id: int | None = None
        self.saved = 0  # generated tokens that are in the journal
        self.heir: Sequence | None = None  # the sequence that takes over the blocks of this one
        self.counted = 0  # generated tokens that are in the totals of the engine or of an earlier run
        self.submitted = submitted  # a time of time.monotonic()
        self.started = submitted
        name = f"{request.seed}\0{request.choice}\0{request.id}".encode()
        self._stream = struct.unpack("<2Q", hashlib.blake2b(name, digest_size=16).digest())
        if request.resumed is not None:
            self._resume(request.resumed)

    def _resume(self, before: PartialCompletion) -> None:
        """Continue what an earlier run generated, as after a preemption; all tokens but the last were computed."""
        for token in before.tokens:
            self.append(token)  # also calls `watch` again
        self.saved = self.counted = self.generated
        self.reached = len(self.tokens) - 1
        self.logprobs, self.top = list(before.logprobs), list(before.top)
        self.prompt_logprobs, self.prompt_top = list(before.prompt_logprobs), list(before.prompt_top)

    @property
    def generated(self) -> int:
        """The number of generated tokens."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """The number of tokens that the next step can compute."""
        if self._needs_all_rows and self.computed < self.passed_over:
            # A step has no rows before it together with rows after it, which are scored or pooled.
            return self.passed_over - self.computed
        return len(self.tokens) - self.computed

    def capacity(self, count: int) -> int:
        """Return how many drafts may follow `count` tokens in the next step: 0 unless a token is drawn after them."""
        request = self.request
        if request.only_reads or self.computed + count < len(self.tokens):
            return 0
        return request.max_tokens - self.generated - 1  # the token drawn after the last draft ends the text

    @property
    def passed_over(self) -> int:
        """The number of first tokens whose rows are not scored or pooled, because not requested or done before."""
        return max(self.reached, self.request.score_from - 1)

    def block_key(self, index: int) -> bytes:
        """Return the content key of the block at `index`, all of whose tokens are known."""
        keys = self._block_keys
        for i in range(len(keys), index + 1):
            before = keys[-1] if keys else first_key(self.request.adapter, self.long)
            keys.append(content_key(before, self.tokens[i * KV_BLOCK : (i + 1) * KV_BLOCK]))
        return keys[index]

    def outgrows(self, short_length: int) -> bool:
        """Return whether it must change to LongRoPE's long factors, because it is longer than `short_length`.

        `short_length` 0 stands for a model without LongRoPE.
        """
        return not self.long and 0 < short_length < len(self.tokens)

    def lengthen(self) -> None:
        """Use LongRoPE's long factors from now on; the sequence must have no blocks."""
        self.long = True
        self._block_keys.clear()

    def goes_on_from(self, before: Sequence) -> bool:
        """Return whether `before` is of the same line and has the same tokens up to `score_from`."""
        one, other = self.request, before.request
        end = one.score_from
        return (one.id, end, one.adapter) == (other.id, other.score_from, other.adapter) and (
            one.prompt[:end] == other.prompt[:end]
        )

    def inherit(self, before: Sequence) -> None:
        """Take over the blocks of a finished sequence, and continue after the common tokens."""
        self.tables, before.tables = before.tables, self.tables
        self.computed = self.passed_over
        self.named = self.computed // KV_BLOCK
        self._block_keys = before._block_keys[: self.named]

    def uniform(self, ahead: int = 0) -> float:
        """Return the random number in [0, 1) of the token `ahead` places after the next one.

        Its key is made of the request's seed, id and choice, and its counter is the token's index in the answer.
        """
        return philox.uniform(self._stream, self.generated + ahead)

    def append(self, token: int) -> None:
        """Append a generated token; sets `finish_reason` if it ends the text."""
        request = self.request
        self.tokens.append(token)
        if token in request.stop_ids:
            stuck = self.constraint is not None and self.constraint.stuck
            self.finish_reason, self.stop_id = "length" if stuck else "stop", token
            return
        if self.constraint is not None:
            self.constraint.push(token)
        if request.watch is not None and request.watch(token):
            self.finish_reason = "stop"
        elif self.constraint is not None and self.constraint.ended:
            self.finish_reason = "stop" if self.constraint.complete else "length"
        elif self.generated >= request.max_tokens:
            self.finish_reason = "length"

    def append_forced(self) -> None:
        """Append the tokens that the constraint determines, without a step for each.

        If log-probabilities are requested, they are drawn one by one instead; the mask allows nothing else.
        """
        request = self.request
        if self.constraint is None or request.logprobs is not None or request.prompt_logprobs is not None:
            return
        while self.finish_reason is None and (forced := self.constraint.forced):
            self.append(forced[0])

    def partial(self) -> PartialCompletion:
        """Return what has been generated so far, without a last token whose log-probability is not yet known."""
        request = self.request
        known = self.generated if request.logprobs is None else min(len(self.logprobs), len(self.top))
        return PartialCompletion(
            tokens=self.tokens[len(request.prompt) :][:known],
            logprobs=self.logprobs[:known],
            top=self.top[:known],
            prompt_logprobs=self.prompt_logprobs,
            prompt_top=self.prompt_top,
            **self._seconds(),
        )

    def completion(self) -> FinishedCompletion:
        """Return the result of the finished request."""
        embedding = None
        if self.request.kind == "embed":
            assert self.pooled is not None
            embedding = self.pooled.astype(np.float32)
            self.finite = bool(np.isfinite(self.pooled).all())
        return FinishedCompletion(
            request=self.request,
            tokens=self.tokens[len(self.request.prompt) :],
            finish_reason=self.finish_reason or "length",
            stop_id=self.stop_id,
            logprobs=self.logprobs,
            top=self.top,
            prompt_logprobs=self.prompt_logprobs,
            prompt_top=self.prompt_top,
            embedding=embedding,
            finite=self.finite,
            **self._seconds(),
        )

    def _seconds(self) -> dict[str, float]:
        waited, ran = self.started - self.submitted, time.monotonic() - self.started
        if (before := self.request.resumed) is not None:
            waited, ran = before.seconds_waiting, before.seconds_running + ran
        return {"seconds_waiting": waited, "seconds_running": ran}
