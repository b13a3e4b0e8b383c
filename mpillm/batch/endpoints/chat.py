"""/v1/chat/completions: messages become a prompt by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from mpillm.batch.endpoints.constraints import Held, grammar_of
from mpillm.batch.endpoints.detokenizer import Detokenizer, finite
from mpillm.batch.endpoints.generate import Generate, Logprobs
from mpillm.batch.endpoints.prompts import encoded
from mpillm.batch.endpoints.sampling import Tokens
from mpillm.batch.endpoints.tools import NamedChoice, ToolChoice, calls_shown, choose, read_calls, read_tools
from mpillm.batch.work import Model, Work
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.errors import RequestError, UnsuitedError
from mpillm.spec import Spec
from mpillm.text import Tokenizer
from mpillm.text.chat_formats.base import ParsedAnswer
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.chat_formats.tagged import AnswerRule, ChatFormat, ReasoningState

# OpenAI's; a template may name others.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PROMPT_END = 16  # tokens of a prompt that tell how the answer begins


class ChatCompletionsEndpoint(Generate, frozen=True, kw_only=True):
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
    include_reasoning: bool | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def starts_text(self) -> bool:
        return not self.continue_final_message

    def requests(self, custom_id: str, spec: Spec, model: Model) -> tuple[Request, ...]:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true")
        if model.text is None:
            raise UnsuitedError(
                "the model has no tokenizer; give token ids as the prompt of /v1/completions, or put its "
                "tokenizer.json beside it"
            )
        if not model.text.has_chat:
            raise UnsuitedError("the model has no chat template; use a prompt with /v1/completions")
        reads = model.text.chat_reads
        if self.reasoning_effort is not None and not (reads("reasoning_effort") or reads("enable_thinking")):
            raise RequestError("the model's chat template uses neither reasoning_effort nor enable_thinking")
        choose(read_tools(self.tools), self.tool_choice)
        if self.tools and not model.text.chat_reads("tools"):
            raise RequestError("the model's chat template does not use tools")
        encode = partial(
            model.text.encode_chat,
            chat_messages(self.messages, model.text),
            self._options(),
            add_special=bool(self.add_special_tokens),
        )
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        around = model.text.around if self.add_special_tokens else ([], [])
        ids = encoded(encode, "the prompt", spec, model, self.cut(asked, spec, model), around)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        requests = self.requests_for(
            custom_id,
            [ids],
            asked,
            spec,
            model,
            logprobs,
            self.prompt_logprobs,
            self._grammar(ids, spec, model),
        )
        if requests[0].max_tokens == 0 and self.prompt_logprobs is None:
            key = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise RequestError(
                f"{key}: 0 generates nothing; to score a text, use /v1/completions with echo: true"
            )
        return requests

    def _options(self) -> dict[str, Any]:
        """Return the variables of the template."""
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt cannot be used together")
        _, choice = choose(read_tools(self.tools), self.tool_choice)
        own = {
            "tools": (self.tools or None) if choice != "none" else None,
            "documents": self.documents or None,
            "add_generation_prompt": False if self.continue_final_message else self.add_generation_prompt,
            "continue_final_message": self.continue_final_message or None,
            "reasoning_effort": self.reasoning_effort,
            "enable_thinking": None if self.reasoning_effort is None else self.reasoning_effort != "none",
        }
        return {key: value for key, value in own.items() if value is not None} | (
            self.chat_template_kwargs or {}
        )

    def response(self, work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
        body = super().response(work, completions, model)
        if self.prompt_logprobs is not None:
            body["prompt_logprobs"] = self.prompt_top(completions[0], Detokenizer(model))
        return body

    def choice(
        self, work: Work, index: int, completion: FinishedCompletion, detokenizer: Detokenizer
    ) -> dict[str, Any]:
        text, stop_reason = self.generated(work, completion, detokenizer)
        answer = self.divide(text, completion.request.prompt, work.spec, detokenizer.model)
        message: dict[str, Any] = {"content": text}
        if answer is not None:
            message = self.message(answer, completion.request, work.spec, detokenizer.model)
        last = self.messages[-1]
        if self.echo and last["role"] == "assistant" and isinstance(last.get("content"), str):
            message["content"] = last["content"] + (message["content"] or "")
        called = "tool_calls" in message and completion.finish_reason == "stop"
        return {
            "index": index,
            "message": {"role": "assistant", **message},
            "logprobs": {"content": _logprobs(completion, detokenizer)} if self.logprobs else None,
            "finish_reason": "tool_calls" if called else completion.finish_reason,
            "stop_reason": stop_reason,
            **self.token_ids(completion),
        }

    def shown(self, spec: Spec, model: Model) -> frozenset[int]:
        """Return the control tokens by which the answer is divided."""
        if model.text is None or not self.skips_special:
            return frozenset()
        control, marks = model.text.control, self._format(spec, model).marks
        return frozenset(control[mark] for mark in marks if mark in control)

    def divide(
        self, text: str, prompt: Sequence[int], spec: Spec, model: Model, final: bool = True
    ) -> ParsedAnswer | None:
        """Return the parts of a text after a prompt; None if it is to be shown as it is. `final` as in `ChatFormat`."""
        if model.text is None or not self.skips_special:
            return None
        tools, choice = choose(read_tools(self.tools), self.tool_choice)
        found = self._format(spec, model)
        callable_tools = tools if choice != "none" else None
        answer = found.split(text, self._state(found, prompt, model.text), callable_tools, final)
        if self.parallel_tool_calls is False:
            answer = replace(answer, calls=answer.calls[:1])
        return answer

    def message(self, answer: ParsedAnswer, request: Request, spec: Spec, model: Model) -> dict[str, Any]:
        """Return the keys of an answer's message besides its role."""
        found = self._format(spec, model)
        shown: dict[str, Any] = {}
        if found.has_reasoning and self.include_reasoning is not False:
            shown["reasoning_content"] = shown["reasoning"] = answer.reasoning  # vLLM's name now, and before
        shown["content"] = answer.content if answer.content.strip() or not answer.calls else None
        if answer.calls:
            shown["tool_calls"] = calls_shown(answer.calls, request, found.id_length)
        return shown

    def _format(self, spec: Spec, model: Model) -> ChatFormat:
        assert model.text is not None
        return model.text.chat_format(spec.chat.reasoning, spec.chat.tool_calls)

    def _state(self, found: ChatFormat, prompt: Sequence[int], text: Tokenizer) -> ReasoningState:
        """Return the beginning of the answer."""
        if self.continue_final_message:
            content = self.messages[-1].get("content")
            return found.continued(content if isinstance(content, str) else "")
        return found.state(text.decode(prompt[-PROMPT_END:], skip_special=False))

    def _grammar(self, prompt: Sequence[int], spec: Spec, model: Model) -> Held | None:
        """Return the grammar that the answer must follow: that of its content after the thoughts, and of calls."""
        assert model.text is not None
        content = grammar_of(self, spec, model)
        tools, choice = choose(read_tools(self.tools), self.tool_choice)
        if choice == "none" or not (choice == "required" or content or any(tool.strict for tool in tools)):
            tools = ()
        if content is None and not tools:
            return None
        found = self._format(spec, model)
        if tools and not found.has_calls:
            raise RequestError(
                "the model's format of tool calls is not known, so answers cannot be constrained to tool "
                "calls; set the job's chat.tool_calls"
            )
        state = self._state(found, prompt, model.text)
        if not tools and not found.thinks(state):
            return content
        one = self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedChoice)
        lark = Lark(model.text.control)
        if content is not None and choice == "required":  # the grammar of calls has no part of it
            content.check(model.text.grammars(model.vocab, model.end_ids))
        held = None if content is None or choice == "required" else lark.embedded(content.grammar)
        whole = lark.whole(found.expression(lark, state, AnswerRule(held, tools, choice, not one)))
        return Held(whole) if content is None else replace(content, grammar=whole)


def _logprobs(completion: FinishedCompletion, detokenizer: Detokenizer) -> list[dict[str, Any]]:
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


def chat_messages(messages: list[dict[str, Any]], text: Tokenizer) -> list[dict[str, Any]]:
    """Messages whose contents are strings, lists of text parts or null."""
    return [_message(message, f"messages[{index}]", text) for index, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str, text: Tokenizer) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{where} needs a role such as 'user'")
    if role not in ROLES and not (role and any(text.chat_reads(f"{one}{role}{one}") for one in "'\"")):
        raise RequestError(
            f"{where} has the role {role[:60]!r}, which the chat template does not name; the usual roles are "
            f"{', '.join(ROLES)}"
        )
    for key in ("function_call", "audio"):
        if message.get(key):
            raise RequestError(f"{where}.{key} is not supported")
    if calls := message.get("tool_calls"):
        message = {"content": None, **message, "tool_calls": read_calls(calls, f"{where}.tool_calls")}
    elif "tool_calls" in message:
        message = {key: value for key, value in message.items() if key != "tool_calls"}
    if "content" not in message and role == "assistant":
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
    if kind == "text":
        raise RequestError(f"{where}.text must be a string")
    raise RequestError(f"{where} is of type {str(kind)[:60]!r}; only text is supported")
