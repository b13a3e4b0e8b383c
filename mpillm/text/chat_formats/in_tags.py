"""Tool calls whose arguments stand in tags, one by one: strings as they are, other values as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillm.text.chat_formats.base import Call, Tool, call_of
from mpillm.text.chat_formats.framed import Framed
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.chat_formats.schemas import definitions, read_value, text, type_of, variants


@dataclass(frozen=True)
class Tags(Framed):
    """Calls as `begin` NAME `named`, for each argument `key` KEY `value` VALUE `stop`, and `end`.

    A line ends behind the name and behind each argument; where `lines`, a value has lines of its own. `as_text` and
    `as_json`, if any, stand behind `value` and tell whether VALUE is a string as it is.
    """

    named: str = ">"
    key: str = "<parameter="
    value: str = ">"
    stop: str = "</parameter>"
    lines: bool = False
    as_text: str = ""
    as_json: str = ""

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*super().marks, self.key, *self.value.split("\n"), self.stop)

    def read(self, text: str, at: int, tools: Sequence[Tool], final: bool) -> tuple[list[Call], int] | None:
        stop = text.find(self.end, at)
        body = text[at:stop]
        head = re.match(rf"\s*([^\s<>\"]+)\s*{re.escape(self.named)}", body)
        if stop < 0 or head is None:  # without its end, a call may lack arguments
            return None
        rest = body[head.end() :].strip()
        tool = next((tool for tool in tools if tool.name == head[1]), Tool(head[1], {}))
        shared = definitions(tool.parameters)
        arguments = {
            key: value
            if kind and kind == self.as_text
            else read_value(value, tool.properties.get(key), shared)
            for key, kind, value in self._arguments(rest)
        }
        call = call_of(head[1], arguments)
        return None if call is None else ([call], stop + len(self.end))

    def _arguments(self, text: str) -> Iterator[tuple[str, str, str]]:
        """Yield the arguments of a call: key, `as_text` or `as_json`, and value."""
        between = r"\s*".join(map(re.escape, self.value.split("\n")))
        kinds = "|".join(map(re.escape, (self.as_text, self.as_json)))
        pattern = f"{re.escape(self.key)}(.*?){between}({kinds})(.*?){re.escape(self.stop)}"
        for key, kind, value in re.findall(pattern, text, re.DOTALL):
            yield key.strip(), kind, value.removeprefix("\n").removesuffix("\n") if self.lines else value

    def write(self, tool: Tool, lark: Lark) -> str:
        parts, shared = [lark.literal(f"{tool.name}{self.named}\n")], definitions(tool.parameters)
        for key, wanted in tool.properties.items():
            part = self._argument(key, wanted, shared, tool.strict, lark)
            parts.append(part if key in tool.required else f"({part})?")
        return " ".join(parts)

    def _argument(self, key: str, schema: Any, shared: Mapping[str, Any], strict: bool, lark: Lark) -> str:
        line = "\n" if self.lines else ""
        end = f"{line}{self.stop}\n"
        ways, others = [], []
        for one in variants(schema, shared):
            if type_of(one) == "string":
                head = lark.literal(f"{self.key}{key}{self.value}{self.as_text}{line}")
                ways.append(f"{head} {text(one, end, strict, lark)}")
            else:
                others.append({**shared, **one} if isinstance(one, dict) else one)
        if others:
            head = lark.literal(f"{self.key}{key}{self.value}{self.as_json}{line}")
            value = " | ".join(lark.schema(one, strict) for one in others)
            ways.append(f"{head} ({value}) {lark.literal(end)}")
        return lark.rule(" | ".join(ways))
