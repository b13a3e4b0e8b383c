"""/v1/completions: prompts as they are given, continued, or scored with `echo` and `max_tokens` 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from numpy.typing import ArrayLike

from mpillm.batch.endpoints.detokenizer import Detokenizer, finite, offsets, with_chosen
from mpillm.batch.endpoints.generate import Generate, Logprobs
from mpillm.batch.endpoints.prompts import read_prompts
from mpillm.batch.work import Column, Model, Work
from mpillm.engine.sequence import Completion, Request
from mpillm.errors import RequestError
from mpillm.spec import Spec


class Completions(Generate, frozen=True, kw_only=True):
    """/v1/completions"""

    url: ClassVar[str] = "/v1/completions"
    key: ClassVar[str] = "prompt"
    columns: ClassVar[tuple[Column, ...]] = (
        *Generate.columns,
        Column("prompt_logprobs", "values", "<f4"),
    )
    id_prefix: ClassVar[str] = "cmpl"
    kind: ClassVar[str] = "text_completion"
    starts_text: ClassVar[bool] = False

    prompt: str | list[Any]
    logprobs: Logprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        prompts = read_prompts(
            "prompt", self.prompt, self.add_special_tokens, self.choices_per_prompt, spec, model
        )
        requests = self.requests_for(
            custom_id,
            prompts,
            self.max_tokens,
            spec,
            model,
            self.logprobs,
            self.logprobs if self.echo else None,
        )
        if requests[0].max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens: 0 generates nothing; add echo: true to score the prompt")
        return requests

    def choice(self, work: Work, completion: Completion, detokenizer: Detokenizer) -> dict[str, Any]:
        text, stop_reason = self.generated(work, completion, detokenizer)
        prompt = ""
        if self.echo:
            given = self._given(completion)
            prompt = detokenizer.text(completion.request.prompt) if given is None else given
        gap = detokenizer.gap if prompt and text else ""
        logprobs = None
        if self.logprobs is not None:
            logprobs = self._logprobs(completion, detokenizer, prompt + gap, text)
        return {
            "index": completion.request.choice,
            "text": f"{prompt}{gap}{text}",
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": stop_reason,
            **self.token_ids(completion),
        }

    def values(self, completion: Completion) -> Mapping[str, ArrayLike]:
        found = dict(super().values(completion))
        if completion.request.prompt_logprobs is not None:
            found["prompt_logprobs"] = completion.prompt_logprobs
        return found

    def _given(self, completion: Completion) -> str | None:
        """The prompt as the string that it came as, None if as token ids."""
        given = self.prompt
        if isinstance(given, list):
            given = given[completion.request.choice // self.choices_per_prompt]
        return given if isinstance(given, str) else None

    def _logprobs(
        self, completion: Completion, detokenizer: Detokenizer, before: str, text: str
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
            scored = with_chosen(prompt[1:], completion.prompt_logprobs, completion.prompt_top)
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
