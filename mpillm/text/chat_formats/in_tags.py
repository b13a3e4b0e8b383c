"""Tool calls whose arguments stand in tags, one by one: strings as they are, other values as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillm.text.chat_formats.base import Call, Tool, call_of, decode_json
from mpillm.text.chat_formats.framed import Framed
from mpillm.text.chat_formats.lark import Lark

PYTHON = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Tags(Framed):
    """Calls as `begin` NAME `named`, for each argument `key` KEY `value` VALUE `stop`, and `end`.

    A line ends behind the name and behind each argument; where `lines`, a value has lines of its own.
    """

    named: str = ">"
    key: str = "<parameter="
    value: str = ">"
    stop: str = "</parameter>"
    lines: bool = False

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
        schemas = next((tool.properties for tool in tools if tool.name == head[1]), {})
        arguments = {key: read_value(value, schemas.get(key)) for key, value in self._arguments(rest)}
        call = call_of(head[1], arguments)
        return None if call is None else ([call], stop + len(self.end))

    def _arguments(self, text: str) -> Iterator[tuple[str, str]]:
        between = r"\s*".join(map(re.escape, self.value.split("\n")))
        pattern = f"{re.escape(self.key)}(.*?){between}(.*?){re.escape(self.stop)}"
        for key, value in re.findall(pattern, text, re.DOTALL):
            yield key.strip(), value.removeprefix("\n").removesuffix("\n") if self.lines else value

    def write(self, tool: Tool, lark: Lark) -> str:
        schema, parts = tool.parameters, [lark.literal(f"{tool.name}{self.named}\n")]
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        for key, wanted in tool.properties.items():
            part = self._argument(key, wanted, shared, tool.strict, lark)
            parts.append(part if key in tool.required else f"({part})?")
        return " ".join(parts)

    def _argument(self, key: str, schema: Any, shared: Mapping[str, Any], strict: bool, lark: Lark) -> str:
        line = "\n" if self.lines else ""
        head = lark.literal(f"{self.key}{key}{self.value}{line}")
        if types_of(schema) != {"string"}:
            value = lark.schema({**shared, **schema} if isinstance(schema, dict) else schema, strict)
        elif isinstance(schema.get("enum"), list):
            value = lark.rule(" | ".join(map(json.dumps, schema["enum"])))
        else:
            return f"{head} {lark.until(line + self.stop)} {lark.literal(chr(10))}"
        return f"{head} {value} {lark.literal(f'{line}{self.stop}{chr(10)}')}"


def types_of(schema: Any) -> set[str]:
    """The types that a schema names; empty if it names none."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    found = {name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(others := schema.get(key), list):
            found = found.union(*map(types_of, others))
    values = schema.get("enum")
    if not found and isinstance(values, list) and all(isinstance(value, str) for value in values):
        return {"string"}
    return found


def read_value(text: str, schema: Any) -> Any:
    """An argument's value: a string where its schema has only strings, else what it is in JSON, or the string."""
    types = types_of(schema)
    if types == {"string"}:
        return text
    found = decode_json(text, 0)
    if found is not None and not text[found[1] :].strip():
        value = found[0]
        return text if isinstance(value, str) and "string" in types else value
    return PYTHON.get(text.strip(), text)
