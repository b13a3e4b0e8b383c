"""A row of an input as a line of JSON; what is wrong with a row is said in place of it, under the key `ROW_ERROR`."""

from __future__ import annotations

from typing import Any

import msgspec

ROW_ERROR = "mpillm: row"  # the key of a row that could not be read
MAX_LINE = 8 * 2**20  # bytes; a longer line is an error result, and is never held in memory as a whole


def byte_count(text: str) -> int:
    """Return bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def row_line(row: dict[str, Any]) -> bytes:
    """Return a row, without a line end; values that JSON lacks become texts."""
    try:
        return msgspec.json.encode(row, enc_hook=str)
    except (UnicodeEncodeError, ValueError, TypeError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeEncodeError) else f"is not JSON: {error}"
        return wrong_row(f"the row {what}")


def wrong_row(what: str) -> bytes:
    """Return the line in place of a row with which `what` is wrong."""
    return msgspec.json.encode({ROW_ERROR: what})
