"""/v1/completions: prompts as they are given, continued, or scored with `echo` and `max_tokens` 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from mpillm.batch.endpoints.constraints import grammar_of
from mpillm.batch.endpoints.detokenizer import Detokenizer, finite, offsets, with_chosen
from mpillm.batch.endpoints.generate import Choices, Generate, Logprobs
from mpillm.batch.endpoints.prompts import read_prompts
from mpillm.batch.work import Model, Work
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.errors import RequestError
from mpillm.spec import Spec


class CompletionsEndpoint(Generate, frozen=True, kw_only=True):
    """/v1/completions"""

    url: ClassVar[str] = "/v1/completions"
    key: ClassVar[str] = "prompt"
    id_prefix: ClassVar[str] = "cmpl"
    kind: ClassVar[str] = "text_completion"

    prompt: str | list[Any]
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: Choices | None = None

    @property
    def starts_text(self) -> bool:
        return False

    @property
    def choices_per_prompt(self) -> int:
        return max(self.best_of or 1, self.n or 1)

    @property
    def _chooses(self) -> bool:
        """Whether some choices are not shown."""
        return self.choices_per_prompt > (self.n or 1)

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise RequestError(
                f"best_of is {self.best_of} and n is {self.n}; best_of must not be smaller than n"
            )
        prompts = read_prompts(
            "prompt",
            self.prompt,
            self.add_special_tokens,
            self.choices_per_prompt,
            spec,
            model,
            self.cut(self.max_tokens, spec, model),
        )
        requests = self.requests_for(
            custom_id,
            prompts,
            self.max_tokens,
            spec,
            model,
            self.logprobs or 0 if self._chooses else self.logprobs,
            self._scored,
            grammar_of(self, spec, model),
        )
        if requests[0].max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RequestError("max_tokens: 0 generates nothing; add echo: true to score the prompt")
        return requests

    @property
    def _scored(self) -> int | None:
        """Alternatives to the prompt's tokens that are wanted."""
        wanted = [self.logprobs if self.echo else None, self.prompt_logprobs]
        return max((count for count in wanted if count is not None), default=None)

    def kept(self, completions: Sequence[FinishedCompletion]) -> Sequence[FinishedCompletion]:
        """Return the `n` of each prompt's `best_of` choices with the highest log-probability per token, best first."""
        if not self._chooses:
            return completions
        found: list[FinishedCompletion] = []
        for at in range(0, len(completions), self.choices_per_prompt):
            choices = completions[at : at + self.choices_per_prompt]
            found += sorted(choices, key=_mean_logprob, reverse=True)[: self.n or 1]
        return found

    def choice(
        self, work: Work, index: int, completion: FinishedCompletion, detokenizer: Detokenizer
    ) -> dict[str, Any]:
        text, stop_reason = self.generated(work, completion, detokenizer)
        prompt = ""
        if self.echo:
            given = self._given(completion)
            prompt = detokenizer.text(completion.request.prompt) if given is None else given
        gap = detokenizer.gap if prompt and text else ""
        logprobs = None
        if self.logprobs is not None:
            logprobs = self._logprobs(completion, detokenizer, prompt + gap, text)
        shown = {}
        if self.prompt_logprobs is not None:
            shown["prompt_logprobs"] = self.prompt_top(completion, detokenizer)
        return {
            "index": index,
            "text": f"{prompt}{gap}{text}",
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": stop_reason,
            **shown,
            **self.token_ids(completion),
        }

    def _given(self, completion: FinishedCompletion) -> str | None:
        """Return the prompt as the string that it came as; None if as token ids, or if it may be cut."""
        given = None if self.truncate_prompt_tokens is not None else self.prompt
        if isinstance(given, list):
            given = given[completion.request.choice // self.choices_per_prompt]
        return given if isinstance(given, str) else None

    def _logprobs(
        self, completion: FinishedCompletion, detokenizer: Detokenizer, before: str, text: str
    ) -> dict[str, list[Any]]:
        """Parallel lists, a token each: the prompt's first where it is echoed (its first token has no logprob)."""
        ids = list(completion.tokens)
        logprobs: list[float | None] = [*map(finite, completion.logprobs)]
        chosen = with_chosen(completion.tokens, completion.logprobs, completion.top)
        tops: list[dict[str, float] | None] = [detokenizer.alternatives(top) for top in chosen]
        gap = len(detokenizer.gap)
        starts = list(
            offsets(detokenizer.pieces(ids, start=False), gap, len(before), len(before) + len(text))
        )
        if self.echo:
            prompt = completion.request.prompt
            prompt_top = [top[: self.logprobs] for top in completion.prompt_top]
            scored = with_chosen(prompt[1:], completion.prompt_logprobs, prompt_top)
            ids = [*prompt, *ids]
            logprobs = [None, *map(finite, completion.prompt_logprobs), *logprobs]
            tops = [None, *(detokenizer.alternatives(top) for top in scored), *tops]
            pieces = detokenizer.echoed_pieces(prompt, self._given(completion))
            starts = [*offsets(pieces, gap, 0, len(before)), *starts]
        return {
            "tokens": [detokenizer.token(token) for token in ids],
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": starts,
        }


def _mean_logprob(completion: FinishedCompletion) -> float:
    return math.fsum(completion.logprobs) / max(len(completion.logprobs), 1)
