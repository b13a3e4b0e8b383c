"""What chats and completions share: sampling settings, stops, choices, and the frame of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta
from numpy.typing import ArrayLike

from mpillm.batch.endpoints.detokenizer import Detokenizer
from mpillm.batch.endpoints.prompts import (
    TokenIds,
    check_answer,
    check_kv,
    check_length,
    max_tokens,
    prompt_name,
)
from mpillm.batch.work import Column, Endpoint, Model, Work, hashed_id
from mpillm.engine.sequence import Completion, Request
from mpillm.errors import RequestError
from mpillm.spec import Fraction, Penalty, Seed, Spec, Stop, Temperature, TopK, TopP
from mpillm.text import StopWatch, cut_at_stop

MAX_LOGPROBS = 20
MAX_CHOICES = 1024
CREATED = 0  # seconds since 1970 that every answer names as its own time

Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]


TOKEN_BYTES = 8  # of a generated token in an answer: its text and perhaps its id
LOGPROB_BYTES = 80  # of a log-probability with its token


def _answer_bytes(request: Request) -> int:
    """About how many bytes a choice may have in the answer."""
    found = request.max_tokens * TOKEN_BYTES
    if request.logprobs is not None:
        found += request.max_tokens * (1 + request.logprobs) * LOGPROB_BYTES
    if request.prompt_logprobs is not None:
        found += len(request.prompt) * (1 + request.prompt_logprobs) * LOGPROB_BYTES
    return found


class Generate(Endpoint, frozen=True, kw_only=True):
    """A body that asks for text; where a key is absent, the job's [sampling] holds."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("tokens", "ids", "<i4"),
        Column("logprobs", "values", "<f4"),
    )
    id_prefix: ClassVar[str]
    kind: ClassVar[str]  # what the answer calls itself
    starts_text: ClassVar[bool]  # the answer begins a text; else it goes on from the prompt

    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Fraction | None = None
    repetition_penalty: Penalty | None = None
    n: Choices | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    def response(self, work: Work, completions: Sequence[Completion], model: Model) -> dict[str, Any]:
        detokenizer = Detokenizer(model, bool(self.return_tokens_as_token_ids))
        generated = sum(len(completion.tokens) for completion in completions)
        return {
            "id": f"{self.id_prefix}-{hashed_id(work.custom_id)}",
            "object": self.kind,
            "created": CREATED,
            "model": model.name,
            # Encoded one by one: the objects of a log-probability take many times its bytes.
            "choices": [
                msgspec.Raw(msgspec.json.encode(self.choice(work, completion, detokenizer)))
                for completion in completions
            ],
            "usage": {
                "prompt_tokens": work.prompt_tokens,
                "total_tokens": work.prompt_tokens + generated,
                "completion_tokens": generated,
            },
        }

    def choice(self, work: Work, completion: Completion, detokenizer: Detokenizer) -> dict[str, Any]:
        """One of the answer's choices."""
        raise NotImplementedError

    def values(self, completion: Completion) -> Mapping[str, ArrayLike]:
        found: dict[str, ArrayLike] = {"tokens": completion.tokens}
        if completion.request.logprobs is not None:
            found["logprobs"] = completion.logprobs
        return found

    def requests_for(
        self,
        custom_id: str,
        prompts: Sequence[TokenIds],
        asked: int | None,
        spec: Spec,
        model: Model,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> tuple[Request, ...]:
        """`n` requests for each prompt; `asked` is the body's own maximum of tokens, None if it has none."""
        stops = self.stops(spec)
        if stops and model.text is None:
            raise RequestError("stop strings need a tokenizer, and the model has none; use stop_token_ids")
        settings, stop_ids = self._settings(spec), self._stop_ids(model)
        requests: list[Request] = []
        for index, ids in enumerate(prompts):
            which = prompt_name(prompts, index)
            available = check_length(ids, which, spec, model)
            count = max_tokens(len(ids), asked, available, which, spec, model)
            check_kv(len(ids) + max(count - 1, 0), spec, model)
            requests += [
                Request(
                    id=custom_id,
                    prompt=ids,
                    choice=len(requests) + choice,
                    max_tokens=count,
                    stop_ids=stop_ids,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    watch=StopWatch(model.text, stops, start=self.starts_text)
                    if stops and model.text
                    else None,
                    **settings,
                )
                for choice in range(self.choices_per_prompt)
            ]
        check_answer(sum(map(_answer_bytes, requests)))
        return tuple(requests)

    def stops(self, spec: Spec) -> tuple[str, ...]:
        """The stop strings: the body's own, or the job's."""
        stop = spec.sampling.stop if self.stop is None else self.stop
        return (stop,) if isinstance(stop, str) else tuple(stop)

    def generated(
        self, work: Work, completion: Completion, detokenizer: Detokenizer
    ) -> tuple[str, str | int | None]:
        """The generated text up to its stop, and what stopped it: a stop string, the body's stop id, or neither."""
        if completion.stop_id is not None:
            reason = completion.stop_id if completion.stop_id in (self.stop_token_ids or ()) else None
            return detokenizer.text(completion.tokens[:-1], self.starts_text), reason
        if completion.finish_reason == "length":  # perhaps inside a character, whose bytes are then left out
            return detokenizer.text(completion.tokens, self.starts_text, final=False), None
        text = detokenizer.text(completion.tokens, self.starts_text)
        stops = self.stops(work.spec)
        kept, _ = cut_at_stop(text, stops)
        rest = text[len(kept) :]
        return kept, min((stop for stop in stops if rest.startswith(stop)), key=len, default=None)

    def token_ids(self, completion: Completion) -> dict[str, Any]:
        """The ids of the answer and of its prompt, where they are asked for."""
        if not self.return_token_ids:
            return {}
        return {"token_ids": completion.tokens, "prompt_token_ids": completion.request.prompt}

    def _settings(self, spec: Spec) -> dict[str, Any]:
        """The body's own sampling settings, the job's where it has none."""
        keys = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        own = {key: getattr(self, key) for key in keys}
        settings = {
            key: getattr(spec.sampling, key) if value is None else value for key, value in own.items()
        }
        settings["top_k"] = max(settings["top_k"], 0)  # -1 means all, as 0 does
        return settings

    def _stop_ids(self, model: Model) -> frozenset[int]:
        for token in self.stop_token_ids or ():
            if not 0 <= token < model.vocab:
                raise RequestError(
                    f"the stop token id {token} is not in the vocabulary (0 to {model.vocab - 1})"
                )
        ends = frozenset() if self.ignore_eos else model.end_ids
        return ends | frozenset(self.stop_token_ids or ())
