"""JSON schemas of arguments in formats that write strings as they are, without the quotes of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mpillm.errors import RequestError
from mpillm.text.chat_formats.base import decode_json
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.schema_checks import check_pattern

PYTHON = {"True": True, "False": False, "None": None}
DEFINITIONS = ("$defs", "definitions")

# Keywords that say nothing about a value, and those of strings that `text` enforces.
NOTES = frozenset({
    "type", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema",
    "$id", "strict", "nullable", *DEFINITIONS,
})  # fmt: skip
OF_STRINGS = NOTES | {"enum", "const", "pattern", "minLength", "maxLength"}


def definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schemas that others refer to, by the keys of `DEFINITIONS`."""
    return {key: schema[key] for key in DEFINITIONS if key in schema}


def variants(schema: Any, shared: Mapping[str, Any], seen: set[str] | None = None) -> Iterator[Any]:
    """Yield the schemas that a schema chooses from, each of one type if it names any; references are followed once."""
    seen = set() if seen is None else seen
    if not isinstance(schema, dict):
        yield schema
        return
    if (found := _referred(schema.get("$ref"), shared)) is not None:
        if (name := repr(schema)) not in seen:
            seen.add(name)
            yield from variants(
                {**found, **{key: schema[key] for key in schema if key != "$ref"}}, shared, seen
            )
        return
    if "const" in schema:
        schema = {**schema, "enum": [schema["const"]]}
    if isinstance(values := schema.get("enum"), list):
        strings = [value for value in values if isinstance(value, str)]
        others = [value for value in values if not isinstance(value, str)]
        if strings:
            yield {**schema, "type": "string", "enum": strings}
        if others or not strings:
            yield {key: value for key, value in schema.items() if key != "type"} | {"enum": others}
        return
    for key in ("anyOf", "oneOf"):
        if isinstance(ways := schema.get(key), list):
            rest = {name: value for name, value in schema.items() if name != key}
            for way in ways:
                yield from variants({**rest, **way} if isinstance(way, dict) else way, shared, seen)
            return
    if isinstance(types := schema.get("type"), list):
        yield from ({**schema, "type": one} for one in types)
    else:
        yield schema


def _referred(name: Any, shared: Mapping[str, Any]) -> dict[str, Any] | None:
    if not isinstance(name, str):
        return None
    for key in DEFINITIONS:
        prefix = f"#/{key}/"
        schemas = shared.get(key)
        if name.startswith(prefix) and isinstance(schemas, dict):
            found = schemas.get(name[len(prefix) :])
            return found if isinstance(found, dict) else None
    return None


def type_of(schema: Any) -> str | None:
    """Return the type that one of the variants names."""
    named = schema.get("type") if isinstance(schema, dict) else None
    return named if isinstance(named, str) else None


def read_value(text: str, schema: Any, shared: Mapping[str, Any]) -> Any:
    """Return an argument's value: a string where its schema has only strings, else its JSON value, or the string."""
    types = {type_of(one) for one in variants(schema, shared)}
    if types == {"string"}:
        return text
    found = decode_json(text, 0)
    if found is not None and not text[found[1] :].strip():
        value = found[0]
        return text if isinstance(value, str) and "string" in types else value
    return PYTHON.get(text.strip(), text)


def text(schema: Mapping[str, Any], end: str, strict: bool, lark: Lark) -> str:
    """Return the expression of a string as it is and of `end` behind it.

    RequestError if it is `strict` and has a keyword that cannot be enforced.
    """
    if isinstance(values := schema.get("enum"), list):
        return f"{lark.rule(' | '.join(map(json.dumps, values)))} {lark.literal(end)}"
    patterns = []
    low, high = (_length(schema, key) for key in ("minLength", "maxLength"))
    if low or high is not None:
        patterns.append(f"(?s:.{{{low or 0},{'' if high is None else high}}})")
    if isinstance(pattern := schema.get("pattern"), str):
        check_pattern(pattern)
        patterns.append(_anywhere(pattern))
    if strict:
        check_keywords(schema, OF_STRINGS)
    return lark.until(end, patterns if strict else ())


def check_keywords(schema: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise RequestError if a schema has a keyword beyond the known ones."""
    if unknown := sorted(schema.keys() - known):
        raise RequestError(
            f"{unknown[0]!r} in the schema of a strict tool cannot be enforced in how this model writes calls"
        )


def _length(schema: Mapping[str, Any], key: str) -> int | None:
    found = schema.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise RequestError(f"{key} must be a whole number from 0 up")
    return found


def _anywhere(pattern: str) -> str:
    """Return the regular expression of whole texts in which a pattern is found."""
    before = after = "(?s:.*)"
    if "|" not in pattern:  # in a pattern with alternatives, an anchor belongs to one of them
        if pattern.startswith("^"):
            pattern, before = pattern[1:], ""
        if re.search(r"(?<!\\)(\\\\)*\$$", pattern):
            pattern, after = pattern[:-1], ""
    return f"{before}(?:{pattern}){after}"
