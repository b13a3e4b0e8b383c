"""/v1/chat/completions: messages become a prompt by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from mpillm.batch.endpoints.detokenizer import Detokenizer, finite
from mpillm.batch.endpoints.generate import Generate, Logprobs
from mpillm.batch.endpoints.prompts import encoded
from mpillm.batch.endpoints.sampling import Tokens
from mpillm.batch.work import Model, Work
from mpillm.engine.sequence import Completion, Request
from mpillm.errors import RequestError
from mpillm.spec import Spec
from mpillm.text import cut_at_stop


class ChatCompletions(Generate, frozen=True, kw_only=True):
    """/v1/chat/completions"""

    url: ClassVar[str] = "/v1/chat/completions"
    key: ClassVar[str] = "messages"
    id_prefix: ClassVar[str] = "chatcmpl"
    kind: ClassVar[str] = "chat.completion"

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    documents: list[dict[str, Any]] | None = None

    @property
    def starts_text(self) -> bool:
        return not self.continue_final_message

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true")
        if model.text is None:
            raise RequestError("the model has no tokenizer; give token ids as the prompt of /v1/completions")
        if not model.text.has_chat:
            raise RequestError("the model has no chat template; use a prompt with /v1/completions")
        if self.reasoning_effort is not None and not model.text.chat_reads("reasoning_effort"):
            raise RequestError("the model's chat template does not look at reasoning_effort")
        encode = partial(
            model.text.encode_chat,
            chat_messages(self.messages),
            self._options(),
            add_special=bool(self.add_special_tokens),
        )
        ids = encoded(encode, "the prompt", spec, model)
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        requests = self.requests_for(custom_id, [ids], asked, spec, model, logprobs, self.prompt_logprobs)
        if requests[0].max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens: 0 generates nothing; scoring is for /v1/completions with echo: true"
            )
        return requests

    def _options(self) -> dict[str, Any]:
        """The variables of the template."""
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude one another")
        own = {
            "documents": self.documents or None,
            "add_generation_prompt": False if self.continue_final_message else self.add_generation_prompt,
            "continue_final_message": self.continue_final_message or None,
            "reasoning_effort": self.reasoning_effort,
        }
        return {key: value for key, value in own.items() if value is not None} | (
            self.chat_template_kwargs or {}
        )

    def response(self, work: Work, completions: Sequence[Completion], model: Model) -> dict[str, Any]:
        body = super().response(work, completions, model)
        if self.prompt_logprobs is not None:
            body["prompt_logprobs"] = self.prompt_top(completions[0], Detokenizer(model))
        return body

    def choice(
        self, work: Work, index: int, completion: Completion, detokenizer: Detokenizer
    ) -> dict[str, Any]:
        text, stop_reason = self.generated(work, completion, detokenizer)
        last = self.messages[-1]
        if self.echo and last["role"] == "assistant" and isinstance(last.get("content"), str):
            text = last["content"] + text
        return {
            "index": index,
            "message": {"role": "assistant", **self._said(work, completion, detokenizer, text)},
            "logprobs": {"content": _logprobs(completion, detokenizer)} if self.logprobs else None,
            "finish_reason": completion.finish_reason,
            "stop_reason": stop_reason,
            **self.token_ids(completion),
        }

    def _said(
        self, work: Work, completion: Completion, detokenizer: Detokenizer, text: str
    ) -> dict[str, str | None]:
        """The content of an answer, and apart from it what the model thought, where its format has channels."""
        if detokenizer.harmony is None:
            return {"content": text}
        ended, final = completion.stop_id is not None, completion.finish_reason != "length"
        tokens = completion.tokens[:-1] if ended else completion.tokens
        thought, said = detokenizer.harmony.split(tokens, lambda ids: detokenizer.text(ids, final=final))
        if final and not ended:
            stops = self.stops(work.spec)
            thought, said = thought and cut_at_stop(thought, stops)[0], cut_at_stop(said, stops)[0]
        return {"reasoning_content": thought, "content": said}


def _logprobs(completion: Completion, detokenizer: Detokenizer) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": detokenizer.token(token),
            "logprob": finite(logprob),
            "bytes": list(detokenizer.raw(token)),
        }

    return [
        {**entry(token, logprob), "top_logprobs": [entry(*one) for one in top]}
        for token, logprob, top in zip(completion.tokens, completion.logprobs, completion.top, strict=True)
    ]


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are strings, lists of text parts or null."""
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where} needs a role such as 'user'")
    for key in ("tool_calls", "function_call", "audio"):
        if message.get(key):
            raise RequestError(f"{where}.{key} is not supported")
    if "content" not in message and message["role"] == "assistant":
        return {**message, "content": ""}
    content = message.get("content", ...)
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    elif not (content is None or isinstance(content, str)):
        raise RequestError(f"{where}.content must be a string or a list of text parts")
    return {**message, "content": content}


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind, text = (
        (part.get("type"), part.get("text")) if isinstance(part, dict) else (type(part).__name__, None)
    )
    if kind == "text" and isinstance(text, str):
        return dict(part)
    raise RequestError(f"{where} is of type {str(kind)[:60]!r}; only text is supported")
