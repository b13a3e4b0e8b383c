"""The text of an answer, bit by bit, as its tokens are generated; of a chat its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpillm.batch.endpoints.chat import ChatCompletionsEndpoint
from mpillm.batch.endpoints.detokenizer import Detokenizer
from mpillm.batch.endpoints.generate import Generate
from mpillm.batch.work import Model
from mpillm.engine.request import Request
from mpillm.spec import Spec
from mpillm.text import IncrementalDecoder, StopStrings


class TextStream:
    """Text of one choice: what `push` and `rest` return makes the text of the answer, in this order.

    All of it comes at the end where tokens alone do not say what the text will be: with echo, special tokens or stop
    strings in the text.
    """

    def __init__(self, endpoint: Generate, spec: Spec, model: Model) -> None:
        shown = endpoint.shown(spec, model)
        self._detokenizer = Detokenizer(model)
        self._decoder = (
            None
            if model.text is None
            else IncrementalDecoder(model.text, endpoint.skips_special, endpoint.starts_text, shown)
        )
        self._stops = StopStrings(endpoint.stops(spec))
        self._given = ""
        self._at_the_end = (
            bool(getattr(endpoint, "echo", None))
            or endpoint.skip_special_tokens is False
            or bool(endpoint.include_stop_str_in_output)
        )

    def push(self, token: int) -> str:
        """Return the text that a token completes and that no stop string can take back, which may be empty."""
        if self._at_the_end:
            return ""
        if self._decoder is not None:
            more, _ = self._stops.push(self._decoder.push(token))
        else:
            more = f"{self._detokenizer.gap if self._given else ''}{self._detokenizer.token(token)}"
        self._given += more
        return more

    def rest(self, text: str) -> str:
        """Return the part of the answer's whole `text` that was not given yet."""
        return text.removeprefix(self._given) if text.startswith(self._given) else ""


class ChatStream:
    """The parts of one answer to a chat, as OpenAI's deltas: what `push` and `rest` return makes its message."""

    def __init__(self, endpoint: ChatCompletionsEndpoint, request: Request, spec: Spec, model: Model) -> None:
        self._endpoint, self._request, self._spec, self._model = endpoint, request, spec, model
        self._stream = TextStream(endpoint, spec, model)
        self._text = ""
        self._given: dict[str, str] = dict.fromkeys(("reasoning_content", "reasoning", "content"), "")
        self._calls = 0  # the number of calls that were given

    def push(self, token: int) -> dict[str, Any]:
        """Return the delta that a token completes, which may be empty."""
        more = self._stream.push(token)
        if not more:
            return {}
        self._text += more
        answer = self._endpoint.divide(self._text, self._request.prompt, self._spec, self._model, final=False)
        if answer is None:
            return {"content": more}
        return self.rest(self._endpoint.message(answer, self._request, self._spec, self._model))

    def rest(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a message that was not given yet."""
        delta: dict[str, Any] = {}
        for key, given in self._given.items():
            text = message.get(key) or ""
            if text.startswith(given) and len(text) > len(given):
                delta[key] = text[len(given) :]
                self._given[key] = text
        if calls := message.get("tool_calls", [])[self._calls :]:
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls, self._calls)]
            self._calls += len(calls)
        return delta
