"""Convert callers' values to those of JSON: arrays of NumPy, pandas, polars and the like become lists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from mpillm.errors import JobError


def ranks_of(given: Any) -> int:
    """Return a number of ranks; JobError if it is none."""
    if isinstance(given, bool) or not isinstance(given, Integral) or int(given) < 1:
        raise JobError(f"ranks must be a whole number >= 1, not {given!r}.")
    return int(given)


def json_of(value: Any) -> str:
    """Return a value as JSON; TypeError if it is none."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """Convert a value that JSON has no form for: arrays and scalars of NumPy, sets, mappings, and other iterables."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | bytearray):
        raise TypeError(f"expected a text, not bytes; decode them: {bytes(value)[:60]!r}.decode()")
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {str(value)[:60]!r}")


def several(given: Any) -> list[Any]:
    """Return a list of requests: of one alone, which is a text, token ids or a line, or of several.

    TypeError if it is none of these.
    """
    if isinstance(given, str | Mapping):
        return [given]
    if isinstance(given, bytes | bytearray) or not isinstance(given, Iterable):
        raise TypeError(f"expected a text, token ids, or several of these, not {given!r:.60}")
    listed = list(given)
    if listed and all(isinstance(one, Real) for one in listed):
        if wrong := [one for one in listed if not isinstance(one, Integral)]:
            raise TypeError(f"token ids must be whole numbers, not {wrong[0]!r}")
        return [listed]
    return listed


def chats_of(given: Any) -> list[Any]:
    """Return a list of chats: of one alone, which is a list of messages, or of several. TypeError if it is neither."""
    chats = list(given) if _is_list(given) else [given]
    if _is_list(given) and chats and isinstance(chats[0], Mapping):
        return [chats]
    for chat in chats:
        if not _is_list(chat):
            raise TypeError(
                f'chat takes a list such as [{{"role": "user", "content": "Hi"}}], not {chat!r:.60}'
            )
    return chats


def _is_list(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, str | Mapping)
