"""The form of a call's arguments that a chat template reads: an object, or its JSON as a string.

Most templates write an object as JSON themselves; some put a string between other strings, and fail with an object.
As with contents, it is tried out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property

from mpillm.errors import RequestError
from mpillm.text.content import FIRST, SECOND, Message


class Arguments:
    """Brings the arguments of tool calls into the form that a template reads."""

    def __init__(self, render: Callable[[list[Message]], str]) -> None:
        self._render = render

    def fit(self, messages: list[Message]) -> list[Message]:
        """Return the messages, whose calls have objects as arguments, in the form that the template reads."""
        return [
            {**message, "tool_calls": [_written(call) for call in message["tool_calls"]]}
            if message.get("tool_calls") and self._wants_strings
            else message
            for message in messages
        ]

    @cached_property
    def _wants_strings(self) -> bool:
        for content in (None, ""):
            function = {"name": "f", "arguments": {FIRST: SECOND}}
            call = {"id": "123456789", "type": "function", "function": function}
            if self._reads(content, call):
                return False
            if self._reads(content, _written(call)):
                return True
        return False

    def _reads(self, content: str | None, call: Message) -> bool:
        chat: list[Message] = [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": call["id"], "name": "f"},
        ]
        try:
            text = self._render(chat)
        except RequestError:
            return False
        return FIRST in text and SECOND in text and f"{{'{FIRST}" not in text


def _written(call: Message) -> Message:
    function = call["function"]
    return {
        **call,
        "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
    }
