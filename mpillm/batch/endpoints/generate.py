"""The common part of chats and completions: sampling settings, stops, choices, and the frame of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta
from numpy.typing import ArrayLike

from mpillm.batch.endpoints.constraints import Held
from mpillm.batch.endpoints.detokenizer import Detokenizer, finite
from mpillm.batch.endpoints.prompts import (
    Cut,
    Side,
    TokenIds,
    Truncated,
    check_answer,
    check_kv,
    check_length,
    cut_of,
    max_tokens,
    prompt_name,
)
from mpillm.batch.endpoints.sampling import Sampled, Tokens
from mpillm.batch.work import Model, ResultColumn, Work, hashed_id
from mpillm.engine.request import Constraint, FinishedCompletion, Request, TopLogprobs
from mpillm.errors import RequestError, UnsuitedError
from mpillm.spec import ResponseFormat, Spec, StopStrings, StructuredOutputs, Word
from mpillm.text import StopWatch, cut_at_stop

MAX_LOGPROBS = 1000
MAX_CHOICES = 1024
CREATED = 0  # seconds since 1970 that every answer names as its own time

Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]

TOKEN_BYTES = 8  # bytes of a generated token in an answer: its text and perhaps its id
LOGPROB_BYTES = 80  # bytes of a log-probability and its token in an answer


def _answer_bytes(request: Request) -> int:
    """About how many bytes a choice may have in the answer."""
    found = request.max_tokens * TOKEN_BYTES
    if request.logprobs is not None:
        found += request.max_tokens * (1 + request.logprobs) * LOGPROB_BYTES
    if request.prompt_logprobs is not None:
        found += len(request.prompt) * (1 + request.prompt_logprobs) * LOGPROB_BYTES
    return found


class Generate(Sampled, frozen=True, kw_only=True):
    """A body that asks for text; where a key is absent, the job's [sampling] holds."""

    columns: ClassVar[tuple[ResultColumn, ...]] = (
        ResultColumn("tokens", "ids", "<i4"),
        ResultColumn("logprobs", "values", "<f4"),
        ResultColumn("prompt_logprobs", "values", "<f4"),
    )
    needs_head: ClassVar[bool] = True
    id_prefix: ClassVar[str]
    kind: ClassVar[str]  # what the answer calls itself

    max_tokens: Tokens | None = None
    n: Choices | None = None
    stop: StopStrings | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[Word], Meta(min_length=1)] | None = None
    guided_grammar: str | None = None
    prompt_logprobs: Logprobs | None = None
    truncate_prompt_tokens: Truncated | None = None
    truncation_side: Side | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def starts_text(self) -> bool:
        """Whether the answer begins a text; else it goes on from the prompt."""
        raise NotImplementedError

    @property
    def skips_special(self) -> bool:
        """Whether control tokens are left out of the text."""
        return self.skip_special_tokens is not False

    def shown(self, spec: Spec, model: Model) -> frozenset[int]:
        """Return the control tokens that are not left out of the text: what becomes of it needs them."""
        return frozenset()

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        shown = self.shown(work.spec, model)
        detokenizer = Detokenizer(model, bool(self.return_tokens_as_token_ids), self.skips_special, shown)
        generated = sum(len(completion.tokens) for completion in completions)
        return {
            "id": f"{self.id_prefix}-{hashed_id(work.custom_id)}",
            "object": self.kind,
            "created": CREATED,
            "model": model.answering(self.model),
            # Encoded one by one: the objects of a log-probability take many times its bytes.
            "choices": [
                msgspec.Raw(msgspec.json.encode(self.choice(work, index, completion, detokenizer)))
                for index, completion in enumerate(self.kept(completions))
            ],
            "usage": {
                "prompt_tokens": work.prompt_tokens,
                "total_tokens": work.prompt_tokens + generated,
                "completion_tokens": generated,
            },
        }

    def kept(self, completions: Sequence[FinishedCompletion]) -> Sequence[FinishedCompletion]:
        """Return the completions that the answer shows."""
        return completions

    def choice(
        self, work: Work, index: int, completion: FinishedCompletion, detokenizer: Detokenizer
    ) -> dict[str, Any]:
        """Return one of the answer's choices."""
        raise NotImplementedError

    def values(self, work: Work, completion: FinishedCompletion, model: Model) -> Mapping[str, ArrayLike]:
        found: dict[str, ArrayLike] = {"tokens": completion.tokens}
        if completion.request.logprobs is not None:
            found["logprobs"] = completion.logprobs
        if completion.request.prompt_logprobs is not None:
            found["prompt_logprobs"] = completion.prompt_logprobs
        return found

    def requests_for(
        self,
        custom_id: str,
        prompts: Sequence[TokenIds],
        asked: int | None,
        spec: Spec,
        model: Model,
        logprobs: int | None,
        prompt_logprobs: int | None,
        grammar: Held | None,
    ) -> tuple[Request, ...]:
        """`n` requests for each prompt; `asked` is the body's own maximum of tokens, None if it has none."""
        stops = self.stops(spec)
        if stops and model.text is None:
            raise UnsuitedError("stop strings need a tokenizer, and the model has none; use stop_token_ids")
        settings = self.settings(spec, model)
        settings["constraint"] = self._constraint(grammar, model)
        requests: list[Request] = []
        for index, ids in enumerate(prompts):
            which = prompt_name(prompts, index)
            available = check_length(ids, which, spec, model)
            count = max_tokens(len(ids), asked, available, which, spec, model)
            check_kv(len(ids) + max(count - 1, 0), spec, model)
            if settings["min_tokens"] > count:
                raise RequestError(
                    f"min_tokens is {settings['min_tokens']}, more than the {count} tokens that may follow {which}"
                )
            requests += [
                Request(
                    id=custom_id,
                    prompt=ids,
                    choice=len(requests) + choice,
                    max_tokens=count,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    watch=self._watch(stops, spec, model) if stops else None,
                    **settings,
                )
                for choice in range(self.choices_per_prompt)
            ]
        check_answer(sum(map(_answer_bytes, requests)))
        return tuple(requests)

    def cut(self, asked: int | None, spec: Spec, model: Model) -> Cut | None:
        """To how many tokens a prompt is cut; `asked` is the body's own maximum of tokens."""
        generated = spec.sampling.max_tokens if asked is None else asked
        return cut_of(self.truncate_prompt_tokens, generated, self.truncation_side or "left", spec, model)

    def _constraint(self, held: Held | None, model: Model) -> Callable[[], Constraint] | None:
        if held is None:
            return None
        if model.text is None:
            raise UnsuitedError("a grammar needs a tokenizer, and the model has none")
        for key in ("min_tokens", "bad_words", "allowed_token_ids"):
            if getattr(self, key):
                raise RequestError(f"{key} and a grammar (or a schema, or choices) cannot be used together")
        grammars = model.text.grammars(model.vocab, model.end_ids)
        held.check(grammars)
        return partial(grammars.matcher, held.grammar)

    def stops(self, spec: Spec) -> tuple[str, ...]:
        """Return the stop strings: the body's own, or the job's."""
        stop = spec.sampling.stop if self.stop is None else self.stop
        return (stop,) if isinstance(stop, str) else tuple(stop)

    def _watch(self, stops: Sequence[str], spec: Spec, model: Model) -> StopWatch:
        assert model.text is not None
        start, after, shown = self.starts_text, self.min_tokens or 0, self.shown(spec, model)
        return StopWatch(model.text, stops, start, self.skips_special, after, shown)

    def generated(
        self, work: Work, completion: FinishedCompletion, detokenizer: Detokenizer
    ) -> tuple[str, str | int | None]:
        """Return the generated text up to its stop, and the reason: a stop string, the body's stop id, or neither."""
        tokens, start, included = completion.tokens, self.starts_text, self.include_stop_str_in_output
        if completion.stop_id is not None:
            reason = completion.stop_id if completion.stop_id in (self.stop_token_ids or ()) else None
            return detokenizer.text(tokens if included else tokens[:-1], start), reason
        if completion.finish_reason == "length":  # perhaps inside a character, whose bytes are then left out
            return detokenizer.text(tokens, start, final=False), None
        text, stops = detokenizer.text(tokens, start), self.stops(work.spec)
        first = tokens[: self.min_tokens or 0]  # no stop string counts in these tokens
        begin = len("".join(detokenizer.pieces(first, start))) if first else 0
        kept, _ = cut_at_stop(text[begin:], stops)
        kept = text[:begin] + kept
        rest = text[len(kept) :]
        stop = min((stop for stop in stops if rest.startswith(stop)), key=len, default=None)
        return kept + stop if stop and included else kept, stop

    def prompt_top(self, completion: FinishedCompletion, detokenizer: Detokenizer) -> list[Any]:
        """vLLM's `prompt_logprobs`: for each token of the prompt but the first its alternatives, and itself, by their
        ids. The rank of a token that is none of them is not known."""
        scored = zip(
            completion.request.prompt[1:], completion.prompt_logprobs, completion.prompt_top, strict=True
        )
        return [None, *(self._alternatives(*token, detokenizer) for token in scored)]

    def _alternatives(
        self, id: int, logprob: float, top: TopLogprobs, detokenizer: Detokenizer
    ) -> dict[str, Any]:
        top = top[: self.prompt_logprobs]
        ranks = {token: rank for rank, (token, _) in enumerate(top, 1)}
        return {
            str(token): {
                "logprob": finite(value),
                "rank": ranks.get(token),
                "decoded_token": detokenizer.token(token),
            }
            for token, value in dict([(id, logprob), *top]).items()
        }

    def token_ids(self, completion: FinishedCompletion) -> dict[str, Any]:
        """Return the ids of the answer and of its prompt, where they are asked for."""
        if not self.return_token_ids:
            return {}
        return {"token_ids": completion.tokens, "prompt_token_ids": completion.request.prompt}
