"""What a row of an input becomes: a line of JSON, or what is wrong with the row in place of it."""

from __future__ import annotations

from typing import Any

import msgspec

ROW_ERROR = "mpillm: row"  # the key of a row that could not be read
MAX_LINE = 8 * 2**20  # bytes; a longer line is an error result, and is never held in memory as a whole


def row_line(row: dict[str, Any]) -> bytes:
    """The row as a line."""
    try:
        return msgspec.json.encode(row, enc_hook=str)
    except (UnicodeEncodeError, ValueError, TypeError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeEncodeError) else f"is no JSON: {error}"
        return wrong_row(f"the row {what}")


def wrong_row(what: str) -> bytes:
    """A line that says what is wrong with the row."""
    return msgspec.json.encode({ROW_ERROR: what})
