"""The parts of chat models' answers, and the interface of a format of tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillm.text.chat_formats.lark import Lark


@dataclass(frozen=True)
class Tool:
    """A function that a model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of its arguments by name, as far as `parameters` has them in this form."""
        found = self.parameters.get("properties")
        return found if isinstance(found, dict) else {}

    @property
    def required(self) -> list[Any]:
        """The arguments that a call must have."""
        found = self.parameters.get("required")
        return found if isinstance(found, list) else []


@dataclass(frozen=True)
class Call:
    """A call of a tool; `arguments` is JSON, `id` what the model itself calls it, if its format has ids."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer in its parts; `reasoning` is None if there is none.

    As an answer grows, its reasoning and its content only become longer, and calls are only added.
    """

    reasoning: str | None
    content: str
    calls: tuple[Call, ...] = ()


class CallFormat:
    """The format in which a model writes tool calls."""

    #: strings that structure the calls; where they are control tokens, texts to be split must show them
    marks: tuple[str, ...]
    id_length: int = 24  # characters of an id that the model's template takes

    def split(self, text: str, tools: Sequence[Tool], final: bool) -> tuple[str, list[Call]]:
        """Return the content of an answer, and its calls. Unless `final`, what may become a call is in neither."""
        raise NotImplementedError

    def required(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """Return the expression of one call, or of one or more if `many`."""
        raise NotImplementedError

    def optional(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        """Return the expression of any text in which the calls, if there are any, obey their tools' schemas."""
        raise NotImplementedError


def call_of(name: Any, arguments: Any, id: str | None = None) -> Call | None:
    """Return a call with arguments that were read from JSON; None if it is none."""
    if isinstance(arguments, str):  # JSON in JSON
        found = decode_json(arguments, 0)
        arguments = None if found is None else found[0]
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + written).encode()
    except (ValueError, RecursionError):  # a number beyond those of JSON, half a character, too many levels
        return None
    return Call(name, written, id)


def decode_json(text: str, at: int) -> tuple[Any, int] | None:
    """Return the JSON value that begins at `at` or behind spaces there, and where it ends; None if there is none."""
    while at < len(text) and text[at].isspace():
        at += 1
    try:
        return _JSON.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None


_JSON = json.JSONDecoder(strict=False)  # models write line ends into strings


def without_open_end(text: str, marks: Sequence[str]) -> str:
    """Return the text without an end with which one of the marks may begin."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(mark.startswith(end) and len(mark) > length for mark in marks):
            return text[:-length]
    return text
