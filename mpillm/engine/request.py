"""A request of the engine, its partial completion, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mpillm.model.batch import NO_ADAPTER

TopLogprobs = list[tuple[int, float]]  # (token id, log-probability), most likely first


class Constraint(Protocol):
    """The state of a request's grammar after the tokens generated so far."""

    @property
    def forced(self) -> list[int]:
        """The next tokens that the grammar determines; empty if there is a choice."""

    @property
    def ended(self) -> bool:
        """Whether the grammar allows no further token."""

    @property
    def complete(self) -> bool:
        """Whether the generated text satisfies the grammar; at its end False only if that could not be decided."""

    @property
    def stuck(self) -> bool:
        """Whether the generated text does not satisfy the grammar and no further token could make it."""

    def push(self, token: int) -> None:
        """Advance by a generated token, which must be allowed."""

    def copy(self) -> Constraint:
        """Return an independent copy in the same state."""

    def accepts(self, token: int) -> bool:
        """Return whether the grammar allows this token next."""

    def allowed(self) -> NDArray[np.int32]:
        """Return the mask of the tokens that may follow: int32 [ceil(vocabulary / 32)], a bit for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialCompletion:
    """The generated part of a request: enough to continue from there with the same final bytes."""

    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)  # one for each of `tokens`, if requested
    top: list[TopLogprobs] = field(default_factory=list)  # one for each of `tokens`
    prompt_logprobs: list[float] = field(default_factory=list)  # one for each of prompt[1:], if requested
    prompt_top: list[TopLogprobs] = field(default_factory=list)  # one for each of prompt[1:]
    seconds_waiting: float = 0.0  # from the beginning of the run to the request's first step
    seconds_running: float = 0.0  # since the request's first step, summed over all runs

    def since(self, start: int) -> PartialCompletion:
        """Return the part from token `start` on; the prompt's log-probabilities are included if `start` is 0."""
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
        """Return this completion up to token `start`, followed by `more`; unchanged if it is shorter than `start`."""
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

    A line of the input with several prompts or ``n > 1`` becomes several requests. `id` and `choice` together identify
    a request, and together with `seed` they are the key of its random numbers.
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
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, summand of its logit)
    allowed: NDArray[np.int32] | None = None  # a bit for each id that may be drawn; None allows all
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of token ids that must not be generated
    min_tokens: int = 0  # tokens generated before any of `stop_ids` is allowed
    seed: int = 0
    # Ids that end the text: end-of-sequence ids unless ignored, and the user's.
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None  # return log-probabilities of generated tokens and of this many alternatives
    prompt_logprobs: int | None = None  # the number of alternatives for the prompt's tokens (echo, scoring)
    score_from: int = 1  # the first token of the prompt whose log-probability is returned
    followed: bool = False  # the next request of the same line has the same tokens up to `score_from`
    pooling: Literal["mean", "last", "cls"] = "mean"
    second: int | None = None  # the position of the second segment of a prompt that has two
    adapter: int = NO_ADAPTER  # the number of the adapter
    watch: Callable[[int], bool] | None = None  # takes each generated id; True ends the text (stop strings)
    constraint: Callable[[], Constraint] | None = None  # creates the grammar's state
    resumed: PartialCompletion | None = None  # what an earlier run generated

    @property
    def only_reads(self) -> bool:
        """Whether the prompt is only read, and nothing is generated."""
        return self.kind == "embed" or self.max_tokens == 0

    @property
    def shifts_logits(self) -> bool:
        """Whether the request may add to the logits of some ids (`adjust.shifts`)."""
        return bool(
            self.logit_bias
            or self.bad_words
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
        )

    @property
    def max_length(self) -> int:
        """The maximum number of tokens in the KV cache."""
        if self.kind == "embed":
            return len(self.prompt)
        return len(self.prompt) + max(0, self.max_tokens - 1)

    @property
    def needs_all_rows(self) -> bool:
        """Whether the result depends on the last layer's output for all prompt tokens (from `score_from` on)."""
        if self.kind == "embed":
            return self.pooling != "last"
        return self.prompt_logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedCompletion(PartialCompletion):
    """The result of a request.

    `tokens` includes the token that ended the text, if there is one (also `stop_id`). Log-probabilities are natural
    logarithms of the model's distribution before penalties and temperature.
    """

    request: Request
    finish_reason: Literal["stop", "length"]
    stop_id: int | None = None
    embedding: NDArray[np.float32] | None = None  # [hidden], not normalised
    finite: bool = True  # False if the model's output was NaN or infinite; there is no result then
