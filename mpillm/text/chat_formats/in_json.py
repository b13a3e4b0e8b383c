"""Tool calls whose arguments are JSON, behind a mark."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mpillm.text.chat_formats.base import Call, Tool, call_of, decode_json
from mpillm.text.chat_formats.framed import Framed
from mpillm.text.chat_formats.lark import Lark


class ObjectKeys(NamedTuple):
    """The names of the parts of an object that is a call."""

    name: str = "name"
    arguments: str = "arguments"
    id: str = ""  # none


HERMES_KEYS = ObjectKeys()
LLAMA_KEYS = ObjectKeys(arguments="parameters")
COMMAND_R_KEYS = ObjectKeys("tool_name", "parameters")
COHERE_KEYS = ObjectKeys("tool_name", "parameters", "tool_call_id")


@dataclass(frozen=True)
class Objects(Framed):
    """Calls as objects {"name": ..., "arguments": ...}, one by one or, if `listed`, in a list or a line each.

    Before the JSON stands `fence`; a call of `no_call`, unless there is such a tool, says that there is none.
    """

    listed: bool = False
    space: str = "\n"  # around the JSON
    keys: ObjectKeys = HERMES_KEYS
    fence: str = ""
    no_call: str = ""

    def read(self, text: str, at: int, tools: Sequence[Tool], final: bool) -> tuple[list[Call], int] | None:
        items: list[Any] = []
        end: int | None = None
        stop = skip_end(text, at, self.fence, final=False)
        if stop is None:
            return None
        while end is None:
            if (items and not self.listed) or (found := decode_json(text, stop)) is None:
                return None
            value, stop = found
            items += value if isinstance(value, list) else [value]
            end = skip_end(text, stop, self.end, final)
        calls = [call_of_object(item) for item in items]
        whole = [call for call in calls if call is not None]
        if not calls or len(whole) < len(calls):
            return None
        names = {tool.name for tool in tools}
        return [call for call in whole if call.name in names or call.name != self.no_call], end

    def write(self, tool: Tool, lark: Lark) -> str:
        return (
            f"{lark.literal(self.space)} {written_object(tool, lark, self.keys)} {lark.literal(self.space)}"
        )

    def required(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        if not self.listed:
            return super().required(lark, tools, many)
        begin = lark.literal(self.begin + self.fence)
        return f"{begin} {self._list(lark, tools, many)} {lark.literal(self.end)}"

    def optional(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        if not self.listed:
            return super().optional(lark, tools, many)
        begin = f"{lark.until(self.begin)} {lark.literal(self.fence)}"
        calls = f"{begin} {self._list(lark, tools, many)} {lark.literal(self.end)}"
        return f"({lark.rule(calls)} | ANY)"

    def _list(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        one = lark.rule(" | ".join(written_object(tool, lark, self.keys) for tool in tools))
        more = f'(", " {one})*' if many else ""
        first, last = (json.dumps(text) for text in (f"{self.space}[", f"]{self.space}"))
        return f"{first} {one} {more} {last}"


@dataclass(frozen=True)
class NamedCalls(Framed):
    """Calls as a name and JSON: `head` is what stands before the JSON, in which {name} is the name, {n} a number.

    Where `ids`, the head without the marks is the call's id; behind `own_id` may stand one that the model made up.
    """

    head: str = "{name}"
    tail: str = ""  # behind the JSON
    ids: bool = False
    own_id: str = ""  # a mark behind the name

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        marks = re.findall(r"<\uff5c[^>]+>|<\|[^>]+>|\[[A-Z_]+\]", self.head + self.own_id)
        return (*super().marks, *marks)

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
        id = head["id"].partition("<")[0].rstrip() if self.ids else head["own"] or None
        call = call_of(head["name"], value, id)
        return None if call is None else ([call], stop)

    @cached_property
    def _pattern(self) -> str:
        """The head as a regular expression, where models may leave a namespace out and put spaces before a mark."""
        pattern = re.sub(r"(?=<|\\\[)", r"\\s*", re.escape(self.head)).replace(
            r"functions\.", r"(?:functions\.)?"
        )
        own = rf"(?:\s*{re.escape(self.own_id)}\s*(?P<own>[^\s\[{{]+))?" if self.own_id else "(?P<own>)"
        name = pattern.replace(r"\{name\}", rf"(?P<name>[^\s<\[{{]+?){own}").replace(r"\{n\}", r"\d+")
        return rf"\s*(?P<id>{name})"

    def write(self, tool: Tool, lark: Lark) -> str:
        before, number, behind = self.head.replace("{name}", tool.name).partition("{n}")
        head = f"{lark.literal(before)} /[0-9]+/ {lark.literal(behind)}" if number else lark.literal(before)
        return f"{head} {lark.schema(tool.parameters, tool.strict)} {lark.literal(self.tail)}"


def call_of_object(value: Any) -> Call | None:
    """Return the call of an object with a name, and with arguments or parameters."""
    if not isinstance(value, dict) or not {"arguments", "parameters"} & value.keys():
        return None
    name, id = value.get("name", value.get(COHERE_KEYS.name)), value.get(COHERE_KEYS.id)
    return call_of(
        name, value.get("arguments", value.get("parameters")), id if isinstance(id, str) and id else None
    )


def written_object(tool: Tool, lark: Lark, keys: ObjectKeys) -> str:
    """Return the expression of an object that calls a tool."""
    id, before = "", "{"
    if keys.id:
        begin = f'{{"{keys.id}": "'
        id, before = f"{json.dumps(begin)} /[0-9]+/ ", '", '
    head = f'{before}"{keys.name}": {json.dumps(tool.name)}, "{keys.arguments}": '
    return f'{id}{json.dumps(head)} {lark.schema(tool.parameters, tool.strict)} "}}"'


def skip_end(text: str, at: int, end: str, final: bool) -> int | None:
    """Return the place after spaces and `end`; None if they do not follow. The text's end may stand for `end`."""
    stop = at
    while stop < len(text) and text[stop].isspace():
        stop += 1
    if not end.strip():
        return at
    if text.startswith(end.strip(), stop):
        return stop + len(end.strip())
    return stop if final and stop == len(text) else None
