"""A request as the engine sees it, what has been generated of it so far, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

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

    @property
    def stuck(self) -> bool:
        """Whether what has been generated does not obey, and nothing could be generated that would."""

    def push(self, token: int) -> None:
        """Take note of a generated token, which was allowed."""

    def copy(self) -> Constraint:
        """Another one that has come as far."""

    def accepts(self, token: int) -> bool:
        """Whether it may follow."""

    def allowed(self) -> NDArray[np.int32]:
        """A bit for each token of the vocabulary that may follow: int32 [ceil(vocabulary / 32)]."""


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
    # Ids that end the text: end-of-sequence ids unless ignored, and the user's.
    stop_ids: frozenset[int] = frozenset()
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
