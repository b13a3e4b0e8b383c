"""How long a text may be, so that one line of the input takes bounded time and memory."""

from __future__ import annotations

from mpillm.errors import RequestError

MAX_CHARS = 1 << 24  # of a text, whatever the model's context


class TooLongError(RequestError):
    """A text has more tokens than it may have; says how many, to follow on from "it has"."""
