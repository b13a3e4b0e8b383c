"""The form of a message's content that a chat template reads: one string, or a list of parts.

Most templates read a string. Some loop over parts ({"type": "text", "text": ...}), and some read both. Which one
it is cannot be seen from the source with certainty, so it is tried out: a template reads a form if the words of a
short chat in that form appear in the result. Each role is tried by itself, because templates differ there, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpillm.errors import RequestError

Message = dict[str, Any]

# A rendered chat: (text, whether it is a control token of the template's own).
Pieces = list[tuple[str, bool]]

REFUSES = "The model's chat template refuses these messages"

# Words that filters such as upper, trim and tojson leave as they are. The third one shows that a template printed the
# list of parts as a whole instead of reading it.
FIRST, SECOND, OTHER = "4096830517", "7315520984", "2864071953"
ANSWERING = frozenset({"assistant", "tool", "function", "ipython"})  # roles that follow a user's message
BETWEEN = "\n"  # parts, where the template reads a string, as in vLLM


@dataclass(frozen=True)
class Forms:
    """The form in which a template reads the content of one role's messages."""

    string: bool = True
    parts: bool = False
    one_part: bool = False  # but no second one

    def fit(self, content: Any) -> Any:
        """Return the content in a form that the template reads, unchanged if it is in one already."""
        if isinstance(content, str):
            return content if self.string or not (self.parts or self.one_part) else [_part(content)]
        if not isinstance(content, list) or self.parts:
            return content
        whole = BETWEEN.join(part["text"] for part in content)
        return [_part(whole)] if self.one_part and not self.string else whole


class Contents:
    """Brings the contents of messages into the form that a template reads; tries out each role once."""

    def __init__(self, render: Callable[[list[Message]], str]) -> None:
        self._render = render
        self._known: dict[str, Forms] = {}

    def fit(self, messages: list[Message]) -> list[Message]:
        """Return the messages, whose parts must be text, in the form that the template reads."""
        return [
            {**message, "content": self._forms(str(message.get("role"))).fit(message["content"])}
            if isinstance(message.get("content"), (str, list))
            else message
            for message in messages
        ]

    def _forms(self, role: str) -> Forms:
        if role not in self._known:
            self._known[role] = self._try(role)
        return self._known[role]

    def _try(self, role: str) -> Forms:
        string = self._reads(role, FIRST, FIRST)
        two = [_part(FIRST, note=OTHER), _part(SECOND, note=OTHER)]
        parts = self._reads(role, two, FIRST, SECOND)
        one_part = parts or (not string and self._reads(role, two[:1], FIRST))
        if string or one_part:
            return Forms(string, parts, one_part)
        return Forms() if role == "user" else self._forms("user")

    def _reads(self, role: str, content: Any, *words: str) -> bool:
        message = {"role": role, "content": content}
        chat = [message]
        if role != "user":
            user = {"role": "user", "content": self._forms("user").fit("1")}
            chat = [user, message, user] if role in ANSWERING else [message, user]
        try:
            text = self._render(chat)
        except RequestError:
            return False
        return all(word in text for word in words) and OTHER not in text


def _part(text: str, **more: str) -> dict[str, str]:
    return {"type": "text", "text": text, **more}
