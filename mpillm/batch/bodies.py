"""A line of the input becomes the checked body of an endpoint: what is taken, what is refused, and by which name."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from typing import Any, TypeVar

import msgspec

from mpillm.batch.endpoints import ENDPOINTS, OTHERS
from mpillm.batch.other_keys import IGNORED, NEUTRAL, REFUSED, Ignored, refuse, short
from mpillm.batch.work import Endpoint
from mpillm.errors import RequestError
from mpillm.spec import allowed_words, plain_words

T = TypeVar("T", bound=msgspec.Struct)

MAX_NAME = 4096  # characters of a custom_id: all of them stay in memory

# What Python's json module writes for a number that is none, and its own words.
_NO_VALUE = re.compile(rb"(?:NaN|Infinity|None|True|False)\b", re.IGNORECASE)
_PLACE = re.compile(r"\(byte (\d+)\)")  # the place in a message of msgspec
_BATCH_KEYS = ("custom_id", "method", "url", "body")
# All keys that an object of a line may have, if only to be refused by their names.
LINE_KEYS = frozenset(
    {*_BATCH_KEYS, *IGNORED, *NEUTRAL, *REFUSED}.union(*(e.__struct_fields__ for e in ENDPOINTS))
)


def decode_line(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a line, or say why there is none (RequestError)."""
    if raw.startswith(codecs.BOM_UTF8):
        raise RequestError("the line begins with a byte order mark (was a file appended?); remove it")
    try:
        value = msgspec.json.decode(raw)
    except RecursionError:
        raise RequestError("the line is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # 0.23 has a DecodeError for both
        if (byte := _first_bad_byte(raw)) is not None:
            raise RequestError(f"the line is not UTF-8 text (byte {byte})") from None
        text = str(error).removeprefix("JSON is malformed: ")
        if (found := _PLACE.search(text)) and (word := _NO_VALUE.match(raw, int(found[1]))):
            text = f"{word[0].decode()} is not a JSON value (byte {found[1]}); write null, true, false or a number"
            raise RequestError(f"the line is not JSON: {text}") from None
        raise RequestError(f"the line is not JSON: {text[0].lower()}{text[1:]}") from None
    if not isinstance(value, dict):
        raise RequestError('the line is not a JSON object such as {"prompt": "..."}')
    return value


def refuse_repeated_keys(raw: bytes) -> None:
    """Raise RequestError if an object of a line has a key twice: readers differ in which value counts.

    What is no JSON is left to `decode_line`. The values are not kept: those of a long line take much memory.
    """
    try:
        _UNIQUE.decode(raw.decode())
    except RecursionError:
        raise RequestError("the line is nested too deeply") from None
    except ValueError:
        pass


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise RequestError(f"the key {twice[:100]!r} occurs twice", twice[:100])


_UNIQUE = json.JSONDecoder(object_pairs_hook=_unique)


def _first_bad_byte(raw: bytes) -> int | None:
    """Return the number (from 1) of the first byte that is not UTF-8, None where all are."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start + 1
    return None


def custom_id_of(line: dict[str, Any]) -> str | None:
    """Return the line's custom_id, None if it has none; RequestError if it is no name."""
    name = line.get("custom_id")
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise RequestError("custom_id must be a non-empty string", "custom_id")
    if len(name) > MAX_NAME:
        raise RequestError(f"custom_id has {len(name)} characters; the maximum is {MAX_NAME}", "custom_id")
    return name


def read_body(line: dict[str, Any]) -> Endpoint:
    """Return a line's checked body; RequestError says what is wrong with the line or its body."""
    endpoint, body = _open(line)
    return _check(endpoint, body)


def _open(line: dict[str, Any]) -> tuple[type[Endpoint], dict[str, Any]]:
    """Return the endpoint that a line asks, and its body; RequestError if there is none."""
    if "body" not in line and "url" not in line and "method" not in line:
        body = {key: value for key, value in line.items() if key != "custom_id" and value is not None}
        known = {endpoint.key for endpoint in ENDPOINTS}
        # A null is said to be wrong if there is nothing else.
        keys = known & body.keys() or known & line.keys()
        found = [one for one in ENDPOINTS if one.key in keys and keys <= set(one.__struct_fields__)]
        if len(found) != 1:
            *names, last = (endpoint.key for endpoint in ENDPOINTS if endpoint.key)
            text = next((key for key, value in body.items() if isinstance(value, str)), None)
            other = (
                f"; to make a prompt of {text}, add --set 'prompt={{{text}}}'" if text and not keys else ""
            )
            if isinstance(line.get("params"), dict):
                other = "; Anthropic's params are the body here, with the url /v1/chat/completions"
            raise RequestError(
                f"the line needs one of {', '.join(names)} or {last}, or a url and a body{other}"
            )
        return found[0], body | {key: line[key] for key in keys}
    for key in line:
        if key not in _BATCH_KEYS:
            raise RequestError(
                f"the key {key!r} is unknown; the keys of a line are {', '.join(_BATCH_KEYS)}", key
            )
    if line.get("method", "POST") != "POST":
        raise RequestError(f"the method must be 'POST', not {short(line['method'])}", "method")
    url = line.get("url")
    urls = {one: endpoint for endpoint in ENDPOINTS for one in (endpoint.url, *endpoint.aliases)}
    if not isinstance(url, str) or url not in urls:
        given = "there is no url" if url is None else f"the url {short(url)} is unknown"
        path = re.sub(r"^\w+://[^/]*", "", url) if isinstance(url, str) else ""
        if path in urls or path in OTHERS:
            raise RequestError(f"{given}; use {OTHERS.get(path, path)}", "url")
        raise RequestError(f"{given}; there are {', '.join(endpoint.url for endpoint in ENDPOINTS)}", "url")
    if not isinstance(line.get("body"), dict):
        raise RequestError("the body must be a JSON object", "body")
    return urls[url], line["body"]


def _check(endpoint: type[Endpoint], body: dict[str, Any]) -> Endpoint:
    """Return the checked body; RequestError names the first key that is wrong, unknown or not supported."""
    known = endpoint.__struct_fields__
    kept: dict[str, Any] = {}
    ignored: dict[str, Any] = {}
    for key, value in body.items():
        if key in known or key in IGNORED:
            # A frame writes 3 as 3.0 where other rows have none.
            whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**63
            (kept if key in known else ignored)[key] = int(value) if whole else value
        elif value is not None or key not in LINE_KEYS:
            refuse(key, value, body, known)
    converted(ignored, Ignored)
    return converted(kept, endpoint)


def converted(values: dict[str, Any], kind: type[T]) -> T:
    """Return an object of JSON as `kind`; RequestError names the key that is missing or wrong."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        path = place.rstrip("`").lstrip(".")
        named = text.rpartition(" ")[2].strip("`")
        if text.startswith("Object missing required field"):
            inside = f" in {path}" if path else ""
            raise RequestError(f"the key {named!r} is missing{inside}", path or named) from None
        if text.startswith("Object contains unknown field"):
            where = f"{path}.{named}".lstrip(".")
            raise RequestError(f"the key {where!r} is unknown", where) from None
        if text.startswith("Invalid enum value") and (words := allowed_words(kind, path)):
            text = f"expected one of {words}, not {text.removeprefix('Invalid enum value ')}"
        said = plain_words(text).replace("a table", "an object")  # JSON's word
        raise RequestError(f"{path}: {said}", path) from None
