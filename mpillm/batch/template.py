"""The template of a job: what is asked of a row, with the row's columns in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec

from mpillm.batch.rows import forms
from mpillm.errors import JobError, RequestError
from mpillm.spec import Spec

_PLACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
# Keys whose values are texts: a number that comes from a column is written out there. In place of other values a text
# that is JSON is read: all that CSV has are texts.
_TEXTS = frozenset({
    "custom_id", "url", "model", "prompt", "input", "role", "name", "content", "text", "title", "query", "queries",
    "items", "text_1", "text_2", "data_1", "data_2", "instruction", "stop", "regex", "guided_regex", "grammar",
    "guided_grammar", "prompt_name", "user",
})  # fmt: skip
_LISTS = frozenset({"documents", "choices", "choice", "guided_choice", "bad_words"})  # of texts


def asker(spec: Spec) -> Callable[[Mapping[str, Any]], dict[str, Any]] | None:
    """Return the function that makes a line of the input from a row, as the job says; None if rows are lines."""
    if spec.request is not None:
        return Template(spec.request).line
    return request_of if forms.is_table(spec.input_path) else None


def request_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request that a row of a table is itself: an empty field is no key, and texts may have JSON."""
    read = {key: value if key in _TEXTS else _read(value) for key, value in row.items() if not is_index(key)}
    return {key: value for key, value in read.items() if value is not None and value != ""}


def is_index(column: str) -> bool:
    """Return whether a column of a table has the numbers or names of rows that pandas writes beside the data."""
    return column.startswith(("Unnamed: ", "__index_level_"))


class Template:
    """The keys of a body (and `custom_id`, `url`), whose strings name columns: `"Label this: {text}"`.

    Braces that name no column are doubled; `{meta.title}` is the title in the column `meta`. A string that is nothing
    but a column is the column's value as it is, such as a list of messages or a number.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        """Raises JobError if a string is no template."""
        self._request = request
        self.columns = frozenset(_columns(request, "request"))

    def missing(self, columns: Collection[str]) -> list[str]:
        """Return the columns of the template that are not among a table's."""
        return sorted(name for name in self.columns if not {name, name.partition(".")[0]} & set(columns))

    def line(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the line of the input that a row stands for; RequestError if it lacks a column.

        A row's own `custom_id` is that of its request, unless the template has another one.
        """
        body = {key: _filled(value, row, key) for key, value in self._request.items()}
        name, url = body.pop("custom_id", row.get("custom_id")), body.pop("url", None)
        if isinstance(name, int | float):
            name = _text(name)
        named = {} if name is None else {"custom_id": name}
        if url is None:
            return named | body
        return named | {"method": "POST", "url": url, "body": body}


def _columns(value: Any, path: str) -> Iterator[str]:
    """Yield the columns that strings in `value` name; `path` is what the job calls it."""
    if isinstance(value, str):
        for found in _PLACES.finditer(value):
            if found[1] is not None:
                yield found[1]
            elif len(found[0]) == 1:
                raise JobError(
                    f"{path} has a {found[0]!r} that is not part of a column name; write {found[0] * 2!r} "
                    "for a brace."
                )
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _columns(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _columns(inner, f"{path}[{index}]")


def _filled(value: Any, row: Mapping[str, Any], key: str) -> Any:
    if isinstance(value, str):
        whole = _PLACES.fullmatch(value)
        if whole is not None and whole[1] is not None:
            found = _value(row, whole[1])
            if isinstance(found, list | dict):
                return found
            if key not in _TEXTS:
                return _read(found)
        return _PLACES.sub(lambda place: _part(row, place), value)
    if isinstance(value, Mapping):
        return {name: _filled(inner, row, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, row, "text" if key in _LISTS else key) for inner in value]
    return value


def _part(row: Mapping[str, Any], place: re.Match[str]) -> str:
    """Return the text that replaces a place in a template."""
    if place[1] is None:
        return place[0][0]
    found = _value(row, place[1])
    if found is None:
        raise RequestError(f"the column {place[1]!r} is null")
    return _text(found)


def _read(found: Any) -> Any:
    """Return the JSON value of a text, if it is not itself a text; an empty text is null, as in CSV."""
    if not isinstance(found, str):
        return found
    if not found.strip():
        return None
    if found.strip().lower() in ("true", "false"):  # as pandas, R and spreadsheets write them
        return found.strip().lower() == "true"
    try:
        value = msgspec.json.decode(found)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return found
    return found if isinstance(value, str) else value


def _value(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        outer, dot, inner = column.partition(".")
        if dot and isinstance(row.get(outer), dict):
            return _value(row[outer], inner)
        has = ", ".join(map(repr, row))[:200] or "none"
        raise RequestError(f"the row has no column {column!r}; it has {has}")
    return row[column]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
