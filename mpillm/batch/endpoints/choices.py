"""/v1/multiple_choice: the log-likelihoods of several continuations of one prompt, and which is the likeliest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta
from numpy.typing import ArrayLike

from mpillm.batch.endpoints.chat import chat_messages
from mpillm.batch.endpoints.generate import CREATED
from mpillm.batch.endpoints.prompts import (
    MAX_PROMPT_TOKENS,
    TokenIds,
    check_length,
    check_sequences,
    encoded,
    read_prompts,
)
from mpillm.batch.work import Endpoint, Model, ResultColumn, Work, hashed_id
from mpillm.engine import exact
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.errors import RequestError, UnsuitedError
from mpillm.spec import Spec

Alternative = Annotated[str, Meta(min_length=1)] | Annotated[list[int], Meta(min_length=1)]
MEASURES = ("logprob", "logprob_per_token", "logprob_per_byte")


class ChoicesEndpoint(Endpoint, frozen=True, kw_only=True):
    """/v1/multiple_choice

    All choices are scored behind the tokens that the prompt alone and the prompt with each of the choices have in
    common. The prompt is computed once.
    """

    url: ClassVar[str] = "/v1/multiple_choice"
    key: ClassVar[str] = "choices"
    needs_head: ClassVar[bool] = True
    columns: ClassVar[tuple[ResultColumn, ...]] = (ResultColumn("loglikelihoods", "values", "<f8"),)

    prompt: str | list[int] | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    choices: Annotated[list[Alternative], Meta(min_length=1)]
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    is_greedy: bool | None = None

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        check_sequences("choices", len(self.choices), 1)
        prompt, wholes = self._tokens(spec, model)
        if sum(map(len, wholes)) > MAX_PROMPT_TOKENS:
            raise RequestError(
                f"the prompt with all choices has more than {MAX_PROMPT_TOKENS} tokens in all; give fewer choices"
            )
        common = min(len(prompt), *(_common(prompt, whole) for whole in wholes))
        if common == 0:
            raise RequestError("the prompt has no tokens that all choices could follow")
        made = []
        for index, ids in enumerate(wholes):
            which = f"the prompt with choices[{index}]"
            check_length(ids, which, spec, model)
            if len(ids) == common:
                raise RequestError(f"choices[{index}] adds no token to the prompt")
            made.append(
                Request(
                    id=custom_id,
                    prompt=ids,
                    choice=index,
                    max_tokens=0,
                    prompt_logprobs=int(bool(self.is_greedy)),
                    score_from=common,
                    followed=index + 1 < len(wholes),
                )
            )
        return tuple(made)

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        totals = np.array([math.fsum(completion.prompt_logprobs) for completion in completions])
        weights = exact.exp(totals - totals.max())
        shown: list[dict[str, Any]] = []
        for index, (choice, completion) in enumerate(zip(self.choices, completions, strict=True)):
            tokens, total = len(completion.prompt_logprobs), float(totals[index])
            nbytes = len(choice.encode()) if isinstance(choice, str) else _bytes(choice, model)
            shown.append(
                {
                    "index": index,
                    "text": choice,
                    "tokens": tokens,
                    "bytes": nbytes,
                    "logprob": total,
                    "logprob_per_token": total / tokens,
                    "logprob_per_byte": total / nbytes if nbytes else None,
                    "probability": float(weights[index] / math.fsum(weights)),
                    **({"is_greedy": _is_greedy(completion)} if self.is_greedy else {}),
                }
            )
        best = {
            measure: max(range(len(shown)), key=lambda at: _value(shown[at][measure])) for measure in MEASURES
        }
        return {
            "id": f"choice-{hashed_id(work.custom_id)}",
            "object": "multiple_choice",
            "created": CREATED,
            "model": model.answering(self.model),
            "choices": shown,
            "best": best,
            "answer": self.choices[best["logprob"]],
            "usage": {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens},
        }

    def values(self, work: Work, completion: FinishedCompletion, model: Model) -> Mapping[str, ArrayLike]:
        return {"loglikelihoods": [math.fsum(completion.prompt_logprobs)]}

    def _tokens(self, spec: Spec, model: Model) -> tuple[TokenIds, list[TokenIds]]:
        """Return the prompt's tokens, and those of the prompt with each choice."""
        if (self.prompt is None) is (self.messages is None):
            raise RequestError("the line needs either prompt or messages with its choices")
        special = self.add_special_tokens
        if isinstance(self.prompt, str) and all(isinstance(choice, str) for choice in self.choices):
            # A token may reach over the border between the prompt and a choice, as in any text.
            (prompt,) = read_prompts("prompt", self.prompt, special, 1, spec, model)
            texts = [self.prompt + str(choice) for choice in self.choices]
            return prompt, read_prompts("choices", texts, special, 1, spec, model)
        if self.messages is not None:
            if model.text is None or not model.text.has_chat:
                raise UnsuitedError("the model has no chat template; give a prompt")
            encode = partial(
                model.text.encode_chat,
                chat_messages(self.messages, model.text),
                self.chat_template_kwargs,
                add_special=bool(special),
            )
            prompt = encoded(encode, "the prompt", spec, model)
        else:
            assert self.prompt is not None
            (prompt,) = read_prompts("prompt", self.prompt, special, 1, spec, model)
        behind = read_prompts("choices", list(self.choices), False, 1, spec, model)
        return prompt, [prompt + ids for ids in behind]


def _common(one: TokenIds, other: TokenIds) -> int:
    """Return the number of tokens that two sequences have in common at their beginning."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _is_greedy(completion: FinishedCompletion) -> bool:
    """Return whether each token of a choice is the likeliest one where it stands."""
    tokens = completion.request.prompt[completion.request.score_from :]
    return all(token == top[0][0] for token, top in zip(tokens, completion.prompt_top, strict=True))


def _bytes(ids: list[int], model: Model) -> int:
    return sum(len(model.text.token_bytes(id)) for id in ids) if model.text is not None else 0


def _value(logprob: float | None) -> float:
    return -math.inf if logprob is None else logprob
