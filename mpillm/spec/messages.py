"""Errors of a job, in the words of TOML and JSON."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec

from mpillm.spec.job import Spec, key_called, known_keys
from mpillm.spec.sizes import shown_value

_PLAIN = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}
_PLAIN |= {"object": "a table", "array": "a list"}
_MISSING = object()


def nearest(key: str, known: set[str]) -> str:
    """Return the known key that was likely meant: of this last word, beginning so in its section, or spelled alike."""
    section, _, leaf = key.rpartition(".")
    leaf = leaf.lower().replace("-", "_")
    siblings = sorted(name for name in known if name.rpartition(".")[0] == section)
    longer = [name for name in siblings if name.rpartition(".")[2].startswith(leaf)]
    leaves = {name.rpartition(".")[2]: name for name in sorted(known)}
    if meant := key_called(leaf) or (longer[0] if len(longer) == 1 else None):
        return f"did you mean {meant!r}?"
    if close := difflib.get_close_matches(
        leaf, [name.rpartition(".")[2] for name in siblings], n=1, cutoff=0.7
    ):
        return f"did you mean {f'{section}.'.lstrip('.') + close[0]!r}?"
    if close := difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7):
        return f"did you mean {leaves[close[0]]!r}?"
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75) if section not in known else []:
        return f"did you mean {close[0]!r}?"
    return f"there are {', '.join(siblings)}."


def other_job(path: Path) -> str:
    """Return a sentence that names an existing job file instead of a missing one."""
    beside = [file.stem for file in path.parent.glob("*.toml")]
    if close := difflib.get_close_matches(path.stem, beside, n=1):
        return f"did you mean {path.parent / close[0]}.toml?"
    return f"{'' if path.suffix == '.toml' else 'a job is TOML, and '}mpillm init job DIR writes some."


def instead_of(text: str, problem: str) -> str:
    """Return a sentence on what to write instead of the line in a TOML parser's `problem`; empty if unknown."""
    found = re.search(r"at line (\d+)", problem)
    line = text.splitlines()[int(found[1]) - 1].partition("#")[0].strip() if found else ""
    key, equals, value = (part.strip() for part in line.partition("="))
    if "overwrite" in problem:
        return f"; {key} occurs twice"
    if re.fullmatch(r"[\w-]+:.*", line):
        return f"; TOML has {line.partition(':')[0]} = VALUE, with quotes around a text"
    if equals and re.match(r"[\w./~$-]", value):
        return f'; a text has quotes: {key} = "{value[:60]}"'
    return ""


def explain(error: msgspec.ValidationError, values: dict[str, Any]) -> str:
    """msgspec's sentence with the key first and the value that was given."""
    text, _, place = str(error).rpartition(" - at `$")
    text, path = (text, place.rstrip("`").lstrip(".")) if text else (str(error), "")
    path, given = _entry(path, values) if path.endswith("[...]") else (path, _look_up(values, path))
    if path == "memory" and isinstance(given, dict):  # said by Memory.__post_init__, which knows the key
        return f"memory.{text}" if ": " in text else f"memory: {text}"
    text = plain_words(text)
    if text.startswith("expected a table") and (
        keys := [key for key in known_keys() if key.startswith(f"{path}.")]
    ):
        return f"{path}: expected a table, with keys such as {keys[0]}, not {shown_value(given)}"
    if text.startswith("invalid enum value") and (words := allowed_words(Spec, path)):
        text = f"expected one of {words}"
    shown = "" if given is _MISSING or isinstance(given, dict) else f", not {shown_value(given)}"
    text = re.sub(r", got [\w ]+$", "", text) if shown else text
    return f"{path}: {text}{shown}"


def plain_words(text: str) -> str:
    """Return one of msgspec's sentences, in the words of those who write TOML and JSON, to go on another one with."""
    text = re.sub(r"`([^`]*)`", lambda found: " or ".join(map(_plain, found[1].split(" | "))), text)
    return text[0].lower() + text[1:]


def _plain(word: str) -> str:
    return _PLAIN.get(word, word)


def _look_up(values: Any, path: str) -> Any:
    for key in re.findall(r"[^.\[\]]+", path):
        try:
            values = values[int(key)] if isinstance(values, list) else values[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return _MISSING
    return values


def _entry(path: str, values: dict[str, Any]) -> tuple[str, Any]:
    """Return the path of the first wrong entry of a table with any keys, and its value; msgspec says `path[...]`."""
    table = path.removesuffix("[...]")
    kinds = [get_args(part)[1] for part in _parts(_kind_of(Spec, table)) if get_origin(part) is dict]
    for name, value in _look_up(values, table).items() if kinds else ():
        try:
            msgspec.convert(value, kinds[0])
        except msgspec.ValidationError:
            return f"{table}.{name}", value
    return path, _MISSING


def allowed_words(root: type[msgspec.Struct], path: str) -> str:
    """Return the words a key of `root` takes, and that it takes a number where it does; "" if it takes no words."""
    kind = _kind_of(root, path)
    words = dict.fromkeys(repr(word) for word in _literals(kind))
    takes_number = any(get_args(part) and get_args(part)[0] is int for part in get_args(kind))
    return ", ".join([*words, "a whole number"] if takes_number else words)


def _kind_of(root: type[msgspec.Struct], path: str) -> Any:
    """Return the type of a key of `root`, or of the list or table with any keys that has the value at `path`."""
    kind: Any = root
    for key in path.split("."):
        struct = next((part for part in _parts(kind) if hasattr(part, "__struct_fields__")), None)
        if struct is None and kind is not root and kind is not None:
            return kind
        fields = {field.name: field.type for field in msgspec.structs.fields(struct or root)}
        kind = fields.get(key.partition("[")[0])
    return kind


def _parts(kind: Any) -> list[Any]:
    """Return a type and those of which it is made: a union's, and what is annotated."""
    parts = get_args(kind) if get_origin(kind) in (Annotated, Union, UnionType) else ()
    return [kind, *(inner for part in parts for inner in _parts(part))]


def _literals(kind: Any) -> list[str]:
    arguments = get_args(kind)
    if arguments and all(isinstance(word, str) for word in arguments):
        return list(arguments)
    return [word for part in arguments for word in _literals(part)]
