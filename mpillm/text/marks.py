"""Marks in a user's strings, by which `chat` tells the template's own control tokens from the user's.

A mark is a character that no text contains. It is placed beside each character of a user's string with which a
control token begins or ends, so that no control token in the rendered chat can consist of the user's characters.

Strings that the template itself compares with ("</think>" in content) are not broken up: they are read from its
source, and get marks around them only where they could be part of a control token. Tests of the content, trims and
repeated use therefore see the same text with marks and without.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

# Noncharacters; hardly any text contains even one of them.
MARKS = "".join(chr(0xFDD0 + n) for n in range(32))
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})


def unused_mark(texts: Iterable[str]) -> str | None:
    """Return a mark that occurs in none of the texts; None if they contain them all."""
    texts = list(texts)
    return next((mark for mark in MARKS if not any(mark in text for text in texts)), None)


class Marker:
    """Puts marks into the strings of a chat.

    `control` are the model's control tokens, `literals` the strings in the template's source, and `compared` those
    that it compares with. A role or a part's type among the latter, and the usual roles, are not the user's words,
    and stay as they are.
    """

    def __init__(
        self, control: Collection[str], literals: Iterable[str], compared: Collection[str] = ()
    ) -> None:
        self._control = [token for token in control if token]
        tokens = sorted(self._control, key=len, reverse=True)
        #: finds control tokens, the longest of those that begin at one place; None if the model has none
        self.tokens = re.compile("(" + "|".join(map(re.escape, tokens)) + ")") if tokens else None
        self._first = frozenset(token[0] for token in tokens)
        self._last = frozenset(token[-1] for token in tokens)
        self._names = ROLES | {text for text in compared if not (self.tokens and self.tokens.search(text))}
        edges = self._first | self._last
        kept = {text for text in literals if len(text) > 1 and edges & set(text)}
        if self.tokens is not None:
            kept = {text for text in kept if not self.tokens.search(text)}
        ordered = sorted(kept, key=len, reverse=True)
        self._kept = re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None

    def marked(self, value: Any, mark: str, key: str = "") -> Any:
        """Return a copy of `value` (JSON) with marks in all its strings but known roles and types."""
        if isinstance(value, str):
            known = key in {"role", "type"} and value in self._names
            return value if known else self._text(value, mark)
        if isinstance(value, dict):
            return {
                self._text(name, mark, inner=False): self.marked(item, mark, name)
                for name, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.marked(item, mark) for item in value]
        return value

    def _text(self, text: str, mark: str, inner: bool = True) -> str:
        pieces = self._kept.split(text) if self._kept else [text]  # text, literal, text, ..., text
        for index, piece in enumerate(pieces):
            pieces[index] = self._around(piece, mark) if index % 2 else self._at_edges(piece, mark)
        marked = "".join(pieces)
        core = text.strip() if inner and marked == text else ""
        if core and any(core in token for token in self._control):
            at = text.index(core) + 1  # "user" alone: the template may write <| and |> around it
            marked = text[:at] + mark + text[at:]
        return marked

    def _at_edges(self, text: str, mark: str) -> str:
        for char in self._first | self._last:
            if char in text:
                before, after = (mark if char in chars else "" for chars in (self._last, self._first))
                text = text.replace(char, before + char + after)
        return text

    def _around(self, literal: str, mark: str) -> str:
        lengths = range(1, len(literal) + 1)
        before = any(token.endswith(literal[:length]) for length in lengths for token in self._control)
        after = any(token.startswith(literal[-length:]) for length in lengths for token in self._control)
        return (mark if before else "") + literal + (mark if after else "")
