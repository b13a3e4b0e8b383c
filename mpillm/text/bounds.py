"""Limit the length of texts, so that one line of the input takes bounded time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpillm.errors import RequestError

CHUNK = 1 << 16  # characters of a long text that are counted at a time, and that are encoded without a break
CHARACTERS = 8  # characters that are encoded for each token that a text is cut to; real texts have fewer
MAX_CHARS = 1 << 24  # the maximum characters of a text, whatever the model's context


class TooLongError(RequestError):
    """A text has more tokens than it may have; says how many, to follow on from "it has"."""


def encoded_at_once(tokens: int) -> int:
    """Return the maximum characters that are encoded at once of a text that may have `tokens` tokens."""
    return max(CHUNK, CHARACTERS * tokens)


@dataclass(frozen=True)
class End:
    """The part that is encoded of a text that will be cut: its last `characters`, or its first."""

    characters: int
    last: bool

    def of(self, text: str) -> str:
        """Return the part of the text that may be encoded; all of a short text."""
        return text[-self.characters :] if self.last else text[: self.characters]

    def of_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
        """Return the part of a text in pieces that may be encoded; control tokens (True) stay whole."""
        left, found = self.characters, list[tuple[str, bool]]()
        for text, control in reversed(pieces) if self.last else pieces:
            if left <= 0:
                break
            found.append((text if control else End(left, self.last).of(text), control))
            left -= len(text)
        return found[::-1] if self.last else found
