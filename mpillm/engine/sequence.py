"""The state of one request while the engine computes it: its tokens, and its place in the cache."""

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
        self.number = 0  # in the order of admission: the lower, the older
        self.computed = 0  # tokens whose keys and values are in the KV cache
        # Maximum of `computed` so far; after a preemption, tokens up to here are computed again.
        self.reached = 0
        self.tables: list[BlockTable] = []  # of each group of layers, all with the same end
        self.long = False  # longer than LongRoPE's short factors are for
        self.slot = NO_SLOT  # of its states
        self.loads = NO_SLOT  # the slot of saved states with which its next chunk begins
        self.saves = NO_SLOT  # the slot in which its states after its next chunk are saved
        self.save_at = 0  # the number of its first tokens after which saved states would be of use to others
        self._block_keys: list[bytes] = []
        self.named = 0  # its first blocks that can be found by their content, or could be
        self.drafts: list[
            Drafted
        ] = []  # computed behind its tokens by the next step, or by the one in flight
        self.drafter: Drafter | None = None  # made when it is first of use
        self.in_flight = False  # part of a step whose reply is outstanding
        self.logprobs: list[float] = []
        self.top: list[TopLogprobs] = []
        self.prompt_logprobs: list[float] = []
        self.prompt_top: list[TopLogprobs] = []
        self.pooled: NDArray[np.float64] | None = None
        self.finish_reason: Literal["stop", "length"] | None = None
        self.finite = True  # the model's outputs so far
        self.stop_id: int | None = None
        self.saved = 0  # generated tokens that the journal has
        self.heir: Sequence | None = None  # of the next request, which goes on in the blocks of this one
        self.counted = 0  # generated tokens that the engine's totals have, or those of an earlier run
        self.submitted = submitted  # as time.monotonic() says
        self.started = submitted
        name = f"{request.seed}\0{request.choice}\0{request.id}".encode()
        self._stream = struct.unpack("<2Q", hashlib.blake2b(name, digest_size=16).digest())
        if request.resumed is not None:
            self._resume(request.resumed)

    def _resume(self, before: PartialCompletion) -> None:
        """Continue what an earlier run has generated, as after a preemption: all but the last token were computed."""
        for token in before.tokens:
            self.append(token)  # so that `watch` sees it again
        self.saved = self.counted = self.generated
        self.reached = len(self.tokens) - 1
        self.logprobs, self.top = list(before.logprobs), list(before.top)
        self.prompt_logprobs, self.prompt_top = list(before.prompt_logprobs), list(before.prompt_top)

    @property
    def generated(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """The number of tokens that the next step can compute."""
        if self._needs_all_rows and self.computed < self.passed_over:
            # Rows from there on are scored or pooled, rows before are not: one step never has both.
            return self.passed_over - self.computed
        return len(self.tokens) - self.computed

    def capacity(self, count: int) -> int:
        """How many drafts may follow if the next step computes `count` tokens: 0 unless a token is drawn then."""
        request = self.request
        if request.only_reads or self.computed + count < len(self.tokens):
            return 0
        return request.max_tokens - self.generated - 1  # what is drawn behind the last one ends the text

    @property
    def passed_over(self) -> int:
        """The number of first tokens whose rows are not scored or pooled: not wanted, or done before."""
        return max(self.reached, self.request.score_from - 1)

    def block_key(self, index: int) -> bytes:
        """The content key of its block number `index`, all of whose tokens are known."""
        keys = self._block_keys
        for i in range(len(keys), index + 1):
            before = keys[-1] if keys else first_key(self.request.adapter, self.long)
            keys.append(content_key(before, self.tokens[i * KV_BLOCK : (i + 1) * KV_BLOCK]))
        return keys[index]

    def outgrows(self, short_length: int) -> bool:
        """Whether it should have LongRoPE's long factors and has not yet; the short ones are for `short_length` tokens.

        0 stands for a model without LongRoPE.
        """
        return not self.long and 0 < short_length < len(self.tokens)

    def lengthen(self) -> None:
        """Have LongRoPE's long factors from now on; nothing of it is in the cache."""
        self.long = True
        self._block_keys.clear()

    def goes_on_from(self, before: Sequence) -> bool:
        """Whether it has the tokens up to `score_from` in common with a sequence of the same line."""
        one, other = self.request, before.request
        end = one.score_from
        return (one.id, end, one.adapter) == (other.id, other.score_from, other.adapter) and (
            one.prompt[:end] == other.prompt[:end]
        )

    def inherit(self, before: Sequence) -> None:
        """Go on from the tokens in common with a finished sequence, in its blocks."""
        self.tables, before.tables = before.tables, self.tables
        self.computed = self.passed_over
        self.named = self.computed // KV_BLOCK
        self._block_keys = before._block_keys[: self.named]

    def uniform(self, ahead: int = 0) -> float:
        """The random number in [0, 1) of the next token, or of one behind it: keyed by request, counted by position."""
        return philox.uniform(self._stream, self.generated + ahead)

    def append(self, token: int) -> None:
        """Append a generated token and decide whether it ends the text."""
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
        """Append the tokens that the constraint forces, without a step for each.

        Where log-probabilities are wanted, they are drawn one by one instead, as the only ones that are allowed.
        """
        request = self.request
        if self.constraint is None or request.logprobs is not None or request.prompt_logprobs is not None:
            return
        while self.finish_reason is None and (forced := self.constraint.forced):
            self.append(forced[0])

    def partial(self) -> PartialCompletion:
        """What has been generated so far, without a last token whose log-probability is missing."""
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
        """The finished request's result."""
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
