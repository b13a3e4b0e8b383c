"""Values for people and programs: JSON, also with paths that are not UTF-8."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec


def printable(text: str) -> str:
    """Return a path or a name, with escapes such as \\xe9 for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def path_of(text: str) -> Path:
    """Return the path that `printable` wrote as `text`: `text` if that file exists, else with escaped bytes."""
    path = Path(text)
    if path.exists():
        return path
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes.fromhex(found[1].decode()), text.encode())
    return Path(os.fsdecode(raw))


def as_json(value: Any) -> bytes:
    """Return a struct or plain values as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(_printable(msgspec.to_builtins(value))), indent=2)


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(item) for item in value]
    return value
