"""Tool calls of FunctionGemma and Gemma 4: call:NAME{key:value,...}, where a mark stands around strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillm.errors import RequestError
from mpillm.text.chat_formats.base import Call, Tool, call_of
from mpillm.text.chat_formats.framed import Framed
from mpillm.text.chat_formats.in_json import skip_end
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.chat_formats.schemas import (
    NOTES,
    check_keywords,
    definitions,
    read_value,
    text,
    type_of,
    variants,
)
from mpillm.text.constrain import MAX_CHOICES

MAX_DEPTH = 64  # levels of values within values
OF_OBJECTS = NOTES | {"properties", "required", "additionalProperties"}
OF_ARRAYS = NOTES | {"items", "minItems", "maxItems"}
KEY = r"/[^\s{}\[\]:,<]+:/"  # a key that no schema names
HEAD = re.compile(r"\s*:?call:\s*([^\s{}:]+)\s*\{")
BARE = re.compile(
    r"([^,{}\[\]]*)(?=[,}\]])"
)  # a value that is no string, object or array, up to what ends it


@dataclass(frozen=True)
class Escaped(Framed):
    """Calls whose strings stand between two `quote`; keys are as they are, or between two `quote` as well."""

    quote: str = ""

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*super().marks, self.quote)

    def read(self, text: str, at: int, tools: Sequence[Tool], final: bool) -> tuple[list[Call], int] | None:
        head = HEAD.match(text, at)
        if head is None:
            return None
        tool = next((tool for tool in tools if tool.name == head[1]), Tool(head[1], {}))
        try:
            value, stop = _Reader(text, self.quote, definitions(tool.parameters)).value(
                head.end() - 1, tool.parameters, 0
            )
        except ValueError:
            return None
        end = skip_end(text, stop, self.end, final)
        call = call_of(head[1], value)
        return None if call is None or end is None else ([call], end)

    def write(self, tool: Tool, lark: Lark) -> str:
        writer = _Writer(self.quote, definitions(tool.parameters), tool.strict, lark)
        schema = {"properties": {}, **tool.parameters, "type": "object"}
        return f"{lark.literal(f'call:{tool.name}')} {writer.value(schema, 0)}"


class _Reader:
    """Reads values; ValueError where there is no whole one."""

    def __init__(self, text: str, quote: str, shared: Mapping[str, Any]) -> None:
        self.text, self.quote, self.shared = text, quote, shared

    def value(self, at: int, schema: Any, depth: int) -> tuple[Any, int]:
        """Return the value that begins at `at` or behind spaces there, and where it ends."""
        if depth > MAX_DEPTH:
            raise ValueError
        at = self._skip(at)
        if self.text.startswith(self.quote, at):
            found, stop = self._quoted(at)
            kinds = {type_of(one) for one in variants(schema, self.shared)}
            plain = None in kinds or "string" in kinds
            return (found if plain else read_value(found, schema, self.shared)), stop
        if self.text[at] == "{":
            return self._object(at + 1, schema, depth + 1)
        if self.text[at] == "[":
            return self._array(at + 1, schema, depth + 1)
        bare = BARE.match(self.text, at)
        if bare is None:
            raise ValueError
        return read_value(bare[1].strip(), schema, self.shared), bare.end()

    def _object(self, at: int, schema: Any, depth: int) -> tuple[dict[str, Any], int]:
        properties: dict[str, Any] = {}
        for one in variants(schema, self.shared):
            if isinstance(one, dict) and isinstance(one.get("properties"), dict):
                properties.update(one["properties"])
        found: dict[str, Any] = {}
        while self.text[at := self._skip(at)] != "}":
            if self.text.startswith(self.quote, at):
                key, at = self._quoted(at)
                at = self._skip(at)
            else:
                stop = self.text.index(":", at)
                key, at = self.text[at:stop].strip(), stop
            if self.text[at] != ":":
                raise ValueError
            found[key], at = self.value(at + 1, properties.get(key), depth)
        return found, at + 1

    def _array(self, at: int, schema: Any, depth: int) -> tuple[list[Any], int]:
        ways = variants(schema, self.shared)
        items = next((one["items"] for one in ways if isinstance(one, dict) and "items" in one), None)
        found: list[Any] = []
        while self.text[at := self._skip(at)] != "]":
            if self.text[at] == "}":
                raise ValueError
            value, at = self.value(at, items, depth)
            found.append(value)
        return found, at + 1

    def _quoted(self, at: int) -> tuple[str, int]:
        begin = at + len(self.quote)
        stop = self.text.index(self.quote, begin)
        return self.text[begin:stop], stop + len(self.quote)

    def _skip(self, at: int) -> int:
        """Return the place of the next character that is no space and no comma."""
        while at < len(self.text) and (self.text[at].isspace() or self.text[at] == ","):
            at += 1
        if at == len(self.text):
            raise ValueError
        return at


class _Writer:
    """Makes expressions of values that schemas accept; objects have none but the keys that their schemas name."""

    def __init__(self, quote: str, shared: Mapping[str, Any], strict: bool, lark: Lark) -> None:
        self.quote, self.shared, self.strict, self.lark = quote, shared, strict, lark
        self._made: dict[str, str] = {}  # the rules of schemas, which may lead to themselves

    def value(self, schema: Any, depth: int) -> str:
        """Return the expression of a value."""
        if depth > MAX_DEPTH:
            raise RequestError(f"there are schemas in more than {MAX_DEPTH} others")
        written = repr(schema)
        if written not in self._made:
            name = self._made[written] = self.lark.reserve()
            ways = [self._variant(one, depth) for one in variants(schema, self.shared)]
            if not ways:
                raise RequestError("a schema refers only to itself")
            self.lark.define(name, " | ".join(ways))
        return self._made[written]

    def _variant(self, schema: Any, depth: int) -> str:
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise RequestError(
                "nothing obeys the schema false" if schema is False else "a schema must be an object"
            )
        if "$ref" in schema:
            raise RequestError(f"there is nothing that {str(schema['$ref'])[:60]!r} refers to")
        if isinstance(values := schema.get("enum"), list):
            return self.lark.rule(" | ".join(self.lark.literal(self._written(value)) for value in values))
        kind = type_of(schema)
        if kind == "string":
            return f"{self.lark.literal(self.quote)} {text(schema, self.quote, self.strict, self.lark)}"
        if kind == "object" or "properties" in schema:
            return self._object(schema, depth + 1)
        if kind == "array" or "items" in schema:
            return self._array(schema, depth + 1)
        if kind is not None:
            return self.lark.schema(schema, self.strict)
        self._check(schema, NOTES)
        return self._anything()

    def _check(self, schema: Mapping[str, Any], known: frozenset[str]) -> None:
        if self.strict:
            check_keywords(schema, known)

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        self._check(schema, OF_OBJECTS)
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, dict):
            pair = f"{KEY} {self.value(schema.get('additionalProperties', True), depth)}"
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        names = required if isinstance(required, list) else []
        parts = [
            (f"{self.lark.literal(f'{key}:')} {self.value(properties[key], depth)}", key in names)
            for key in sorted(properties, key=str.lower)  # as the templates write them
        ]
        return f'"{{" {self.lark.in_order(parts, ",")} "}}"'

    def _array(self, schema: Mapping[str, Any], depth: int) -> str:
        self._check(schema, OF_ARRAYS)
        low, high = schema.get("minItems") or 0, schema.get("maxItems")
        for count in (low, high):
            if count is not None and not (isinstance(count, int) and 0 <= count <= MAX_CHOICES):
                raise RequestError(f"minItems and maxItems must be whole numbers up to {MAX_CHOICES}")
        if high == 0:
            return '"[]"'
        one = self.value(schema.get("items", True), depth)
        more = f'("," {one}){{{max(low - 1, 0)},{"" if high is None else high - 1}}}'
        return f'"[" {one} {more} "]"' if low else f'("[]" | "[" {one} {more} "]")'

    def _anything(self) -> str:
        """Return the rule of any value."""
        if "" not in self._made:
            name = self._made[""] = self.lark.reserve()
            string = f"{self.lark.literal(self.quote)} {self.lark.until(self.quote)}"
            scalar = self.lark.schema({"type": ["number", "boolean", "null"]}, True)
            members = f'"{{" ({KEY} {name} ("," {KEY} {name})*)? "}}"'
            items = f'"[" ({name} ("," {name})*)? "]"'
            self.lark.define(name, f"{string} | {scalar} | {members} | {items}")
        return self._made[""]

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        if isinstance(value, dict):
            pairs = (f"{key}:{self._written(value[key])}" for key in sorted(value, key=str.lower))
            return f"{{{','.join(pairs)}}}"
        return f"[{','.join(map(self._written, value))}]" if isinstance(value, list) else json.dumps(value)
