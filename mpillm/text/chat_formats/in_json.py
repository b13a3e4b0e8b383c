"""Tool calls whose arguments are JSON, behind a mark."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpillm.text.chat_formats.base import Call, Tool, call_of, decode_json
from mpillm.text.chat_formats.framed import Framed
from mpillm.text.chat_formats.lark import Lark


@dataclass(frozen=True)
class Objects(Framed):
    """Calls as objects {"name": ..., "arguments": ...}, one by one or, if `listed`, in a list."""

    listed: bool = False
    space: str = "\n"  # around the JSON

    def read(self, text: str, at: int, tools: Sequence[Tool], final: bool) -> tuple[list[Call], int] | None:
        found = decode_json(text, at)
        if found is None:
            return None
        value, stop = found
        calls = [call_of_object(item) for item in (value if isinstance(value, list) else [value])]
        end = skip_end(text, stop, self.end, final)
        if end is None or not calls:
            return None
        whole = [call for call in calls if call is not None]
        return (whole, end) if len(whole) == len(calls) else None

    def write(self, tool: Tool, lark: Lark) -> str:
        return (
            f"{lark.literal(self.space)} {written_object(tool, lark, 'arguments')} {lark.literal(self.space)}"
        )

    def required(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        if not self.listed:
            return super().required(lark, tools, many)
        return f"{lark.literal(self.begin)} {self._list(lark, tools, many)} {lark.literal(self.end)}"

    def optional(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        if not self.listed:
            return super().optional(lark, tools, many)
        calls = f"{lark.until(self.begin)} {self._list(lark, tools, many)} {lark.literal(self.end)}"
        return f"({lark.rule(calls)} | ANY)"

    def _list(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        one = lark.rule(" | ".join(written_object(tool, lark, "arguments") for tool in tools))
        more = f'(", " {one})*' if many else ""
        return f'"[" {one} {more} "]"'


@dataclass(frozen=True)
class NamedCalls(Framed):
    """Calls as a name and JSON: `head` is what stands before the JSON, in which {name} is the name, {n} a number.

    Where `ids`, the head without the marks is the call's id.
    """

    head: str = "{name}"
    tail: str = ""  # behind the JSON
    ids: bool = False

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*super().marks, *re.findall(r"<\uff5c[^>]+>|<\|[^>]+>|\[[A-Z_]+\]", self.head))

    def read(self, text: str, at: int, tools: Sequence[Tool], final: bool) -> tuple[list[Call], int] | None:
        head = re.compile(self._pattern).match(text, at)
        if head is None or (found := decode_json(text, head.end())) is None:
            return None
        value, stop = found
        for part in (self.tail, self.end):
            after = skip_end(text, stop, part, final)
            if after is None:
                return None
            stop = after
        call = call_of(head["name"], value, head["id"].partition("<")[0].rstrip() if self.ids else None)
        return None if call is None else ([call], stop)

    @cached_property
    def _pattern(self) -> str:
        """The head as a regular expression, where models may leave a namespace out and put spaces before a mark."""
        pattern = re.sub(r"(?=<|\\\[)", r"\\s*", re.escape(self.head)).replace(
            r"functions\.", r"(?:functions\.)?"
        )
        name = pattern.replace(r"\{name\}", r"(?P<name>[^\s<\[{]+?)").replace(r"\{n\}", r"\d+")
        return rf"\s*(?P<id>{name})"

    def write(self, tool: Tool, lark: Lark) -> str:
        before, number, behind = self.head.replace("{name}", tool.name).partition("{n}")
        head = f"{lark.literal(before)} /[0-9]+/ {lark.literal(behind)}" if number else lark.literal(before)
        return f"{head} {lark.schema(tool.parameters, tool.strict)} {lark.literal(self.tail)}"


def call_of_object(value: Any) -> Call | None:
    """The call of an object with a name, and with arguments or parameters."""
    if not isinstance(value, dict) or not {"arguments", "parameters"} & value.keys():
        return None
    return call_of(value.get("name"), value.get("arguments", value.get("parameters")))


def written_object(tool: Tool, lark: Lark, key: str) -> str:
    """The expression of an object that calls a tool."""
    head = f'{{"name": {json.dumps(tool.name)}, "{key}": '
    return f'{json.dumps(head)} {lark.schema(tool.parameters, tool.strict)} "}}"'


def skip_end(text: str, at: int, end: str, final: bool) -> int | None:
    """Where a text goes on behind spaces and `end`; None if that does not follow. It may be missing at the end."""
    stop = at
    while stop < len(text) and text[stop].isspace():
        stop += 1
    if not end.strip():
        return at
    if text.startswith(end.strip(), stop):
        return stop + len(end.strip())
    return stop if final and stop == len(text) else None
