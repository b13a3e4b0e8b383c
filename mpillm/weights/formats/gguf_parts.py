"""The names of the parts that llama.cpp's gguf-split makes of a model."""

from __future__ import annotations

import re

PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 999


def gguf_parts(name: str) -> list[str]:
    """Return the names of all parts of a split file, of which `name` is one, or `name` alone."""
    if not (match := PART.fullmatch(name)):
        return [name]
    count = min(int(match["count"]), MAX_PARTS)
    return [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1)]


def is_later_part(name: str) -> bool:
    """Return whether a file of this name is a part of a model, but not the first one, which describes it."""
    match = PART.fullmatch(name)
    return match is not None and int(match["number"]) != 1
