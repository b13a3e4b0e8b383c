"""A request as the engine sees it, the state of one request while it runs, and its completion."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mpillm.engine import philox
from mpillm.engine.blocks import NO_SLOT, BlockTable, content_key, first_key
from mpillm.engine.drafter import Drafted, Drafter
from mpillm.kernels import KV_BLOCK
from mpillm.model.batch import NO_ADAPTER

TopLogprobs = list[tuple[int, float]]  # (token id, log-probability), most likely first


class Constraint(Protocol):
    """What the tokens of a request must obey, as far as they have been generated."""

    @property
    def forced(self) -> list[int]:
        """The tokens that must follow, whatever the model says."""

    @property
    def ended(self) -> bool:
        """Whether no token may follow."""

    @property
    def complete(self) -> bool:
        """Whether what has been generated obeys; at its end false only where that could not be found out."""

    def push(self, token: int) -> None:
        """Take note of a generated token, which was allowed."""

    def copy(self) -> Constraint:
        """Another one that has come as far."""

    def accepts(self, token: int) -> bool:
        """Whether it may follow."""

    def allowed(self) -> NDArray[np.int32]:
        """A bit for each token of the vocabulary that may follow, in words of 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialCompletion:
    """What has been generated of a request: enough to continue from there and end in the same bytes."""

    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)  # of `tokens`, if asked for
    top: list[TopLogprobs] = field(default_factory=list)  # per token of `tokens`
    prompt_logprobs: list[float] = field(default_factory=list)  # of prompt[1:], if asked for
    prompt_top: list[TopLogprobs] = field(default_factory=list)  # per token of prompt[1:]
    seconds_waiting: float = 0.0  # from the run's beginning to its first step
    seconds_running: float = 0.0  # since its first step, summed over all runs

    def since(self, start: int) -> PartialCompletion:
        """What follows token `start`; the prompt's log-probabilities belong to `start` = 0."""
        return PartialCompletion(
            tokens=self.tokens[start:],
            logprobs=self.logprobs[start:],
            top=self.top[start:],
            prompt_logprobs=[] if start else self.prompt_logprobs,
            prompt_top=[] if start else self.prompt_top,
            seconds_waiting=self.seconds_waiting,
            seconds_running=self.seconds_running,
        )

    def continued(self, start: int, more: PartialCompletion) -> PartialCompletion:
        """This one up to token `start`, followed by `more`; unchanged if it is shorter than `start`."""
        if start > len(self.tokens):
            return self
        return PartialCompletion(
            tokens=self.tokens[:start] + more.tokens,
            logprobs=self.logprobs[:start] + more.logprobs,
            top=self.top[:start] + more.top,
            prompt_logprobs=self.prompt_logprobs if start else more.prompt_logprobs,
            prompt_top=self.prompt_top if start else more.prompt_top,
            seconds_waiting=more.seconds_waiting,
            seconds_running=more.seconds_running,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to compute: a prompt of token ids, and how to continue it.

    A line of the input with several prompts or ``n > 1`` becomes several of these; `id` and `choice`
    together name one, and together with `seed` they key its random stream.
    """

    id: str
    prompt: tuple[int, ...]
    choice: int = 0
    kind: Literal["generate", "embed"] = "generate"
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    allowed: NDArray[np.int32] | None = None  # a bit for each id that may be drawn; None: all may
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that must not follow one another
    min_tokens: int = 0  # so many tokens are generated before any of `stop_ids`
    seed: int = 0
    stop_ids: frozenset[int] = (
        frozenset()
    )  # ids that end the text: end-of-sequence ids unless ignored, and the user's
    logprobs: int | None = None  # log-probabilities of the generated tokens, and of this many alternatives
    prompt_logprobs: int | None = None  # the same of the prompt's tokens (echo, scoring)
    score_from: int = 1  # the first token of the prompt whose log-probability is wanted
    followed: bool = False  # the next request of the same line has the same tokens up to `score_from`
    pooling: Literal["mean", "last", "cls"] = "mean"
    second: int | None = None  # where the second segment of a prompt begins, if it has two
    adapter: int = NO_ADAPTER  # the number of its adapter
    watch: Callable[[int], bool] | None = None  # sees each generated id; True ends the text (stop strings)
    constraint: Callable[[], Constraint] | None = None  # makes what the generated tokens must obey
    resumed: PartialCompletion | None = None  # what an earlier run has generated

    @property
    def only_reads(self) -> bool:
        """Whether nothing is generated."""
        return self.kind == "embed" or self.max_tokens == 0

    @property
    def shifts_logits(self) -> bool:
        """Whether anything may be added to the logits of some ids."""
        return bool(
            self.logit_bias
            or self.bad_words
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
        )

    @property
    def max_length(self) -> int:
        """The maximum number of tokens whose keys and values it will need."""
        if self.kind == "embed":
            return len(self.prompt)
        return len(self.prompt) + max(0, self.max_tokens - 1)

    @property
    def needs_all_rows(self) -> bool:
        """Whether the result depends on the last layer's output for all tokens of the prompt (from `score_from` on)."""
        if self.kind == "embed":
            return self.pooling != "last"
        return self.prompt_logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedCompletion(PartialCompletion):
    """The result of a request.

    `tokens` includes the end token, if one ended the text (it is `stop_id` too). Log-probabilities are of the
    model's own distribution, before penalties and temperature, natural logarithm.
    """

    request: Request
    finish_reason: Literal["stop", "length"]
    stop_id: int | None = None
    embedding: NDArray[np.float32] | None = None  # [hidden], not normalised
    finite: bool = True  # False: the model's output was NaN or infinite, so there is no result


class Sequence:
    """The state of one request while it runs; only the scheduler and the engine change it."""

    def __init__(self, request: Request, submitted: float = 0.0) -> None:
        self.request = request
        self._needs_all_rows = request.needs_all_rows
        self.tokens = list(request.prompt)
        self.constraint = None if request.constraint is None else request.constraint()
        self.number = 0  # in the order of admission: the lower, the older
        self.computed = 0  # tokens whose keys and values are in the KV cache
        self.reached = (
            0  # maximum of `computed` so far; after a preemption, tokens up to here are computed again
        )
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

    def room(self, count: int) -> int:
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
            self.finish_reason, self.stop_id = "stop", token
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
