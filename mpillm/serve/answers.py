"""Format answers for clients: a JSON body, or the chunks of a stream in OpenAI's form."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.exceptions import HTTPException

from mpillm.batch.endpoints.chat import ChatCompletionsEndpoint
from mpillm.batch.endpoints.generate import Generate
from mpillm.batch.streaming import ChatStream, TextStream
from mpillm.batch.work import Model, Work
from mpillm.engine.request import FinishedCompletion

DONE = b"data: [DONE]\n\n"
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}  # OpenAI's, of a status that has one


class Refused(HTTPException):
    """The error of a request, with the key that is wrong and OpenAI's code of the error, if there are such."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def body(work: Work, completions: Sequence[FinishedCompletion], model: Model) -> dict[str, Any]:
    """Return the answer as JSON has it, with an id and a time of its own (a batch's answers have neither)."""
    made = work.endpoint.response(work, completions, model)
    if isinstance(made.get("id"), str):
        made["id"] = f"{made['id'].partition('-')[0]}-{uuid.uuid4().hex[:24]}"
    if "created" in made:
        made["created"] = int(time.time())
    return made


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "requests" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


class Stream:
    """The chunks of one streamed answer, as server-sent events."""

    def __init__(self, work: Work, model: Model, include_usage: bool) -> None:
        endpoint = work.endpoint
        assert isinstance(endpoint, Generate)
        self._work, self._model, self._usage = work, model, include_usage
        self._chats: list[ChatStream] = []
        self._texts: list[TextStream] = []
        if isinstance(endpoint, ChatCompletionsEndpoint):
            self._chats = [ChatStream(endpoint, request, work.spec, model) for request in work.requests]
        else:
            self._texts = [TextStream(endpoint, work.spec, model) for _ in work.requests]
        self._frame = {
            "id": f"{endpoint.id_prefix}-{uuid.uuid4().hex[:24]}",
            "object": "chat.completion.chunk" if self._chats else endpoint.kind,
            "created": int(time.time()),
            "model": model.answering(endpoint.model),
        }

    def begin(self) -> Iterator[bytes]:
        """Yield the chunk before any text."""
        for index in range(len(self._chats)):
            yield self._event(self._choice(index, {"role": "assistant", "content": ""}))

    def push(self, choice: int, token: int) -> Iterator[bytes]:
        """Yield the chunk for a token of a choice."""
        stream = self._chats[choice] if self._chats else self._texts[choice]
        if more := stream.push(token):
            yield self._event(self._choice(choice, more))

    def end(self, completions: Sequence[FinishedCompletion]) -> Iterator[bytes]:
        """Yield the chunks after all choices: the rest of each text, log-probabilities, reason of the end, usage."""
        made = msgspec.json.decode(msgspec.json.encode(body(self._work, completions, self._model)))
        for choice in made["choices"]:
            index, delta = choice["index"], None
            if self._chats:
                delta = self._chats[index].rest(choice["message"])
            else:
                delta = self._texts[index].rest(choice["text"])
            more = {k: choice[k] for k in ("logprobs", "finish_reason", "stop_reason") if k in choice}
            yield self._event(self._choice(index, delta, **more))
        if self._usage:
            yield self._event(usage=made["usage"])
        yield DONE

    def fail(self, message: str, status: int) -> Iterator[bytes]:
        """Yield the chunk if there will be no answer."""
        yield _event(error(message, status))

    def _choice(self, index: int, delta: Any, **more: Any) -> dict[str, Any]:
        key = "delta" if self._chats else "text"
        return {"index": index, key: delta, "logprobs": None, "finish_reason": None, **more}

    def _event(self, *choices: dict[str, Any], **more: Any) -> bytes:
        return _event({**self._frame, "choices": choices, **more})


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
