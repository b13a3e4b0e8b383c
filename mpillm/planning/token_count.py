"""How many tokens the texts of an input are: counted in its first part, and bounded by their bytes behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from mpillm.errors import RequestError
from mpillm.text import Tokenizer

COUNTED = 1 << 20  # bytes of the part that is tokenized: some tenths of a second
BYTES_PER_TOKEN = 4  # of a text, by an estimate where there is no tokenizer
SPECIAL = 4  # tokens that one puts around a text


class Tokens(NamedTuple):
    """The number of tokens: an estimate, and the most there can be."""

    likely: int
    maximum: int


class Around(NamedTuple):
    """Bytes of what a model's files put around texts."""

    template: int = 0  # for chats
    prompt: int = 0  # before a text that gets an embedding, at most


NOTHING = Around()


class TokenCounter:
    """Counts tokens with the model's tokenizer, if it has one: it is loaded for the first text."""

    def __init__(self, load: Callable[[], Tokenizer | None]) -> None:
        self._load = load
        self._bytes = self._tokens = 0  # of what was counted

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return self._load()

    def count(self, value: bytes) -> Tokens:
        """The tokens of all texts in a value of JSON, with what the tokenizer puts around them."""
        if self._bytes + len(value) > COUNTED:
            maximum = len(value) + SPECIAL * value.count(b'"') // 2
            return Tokens(len(value) * self._tokens // max(self._bytes, 1), maximum)
        try:
            texts = list(_texts(msgspec.json.decode(value)))
            if self._tokenizer is None:
                likely = -(-sum(map(len, texts)) // BYTES_PER_TOKEN)
                found = Tokens(likely, len(value) + SPECIAL * len(texts))
            else:
                ids = sum(len(self._tokenizer.encode(text)) for text in texts)
                found = Tokens(ids, ids)
        except (RequestError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return Tokens(0, len(value))  # an error of that line
        self._bytes, self._tokens = self._bytes + len(value), self._tokens + found.likely
        return found


def _texts(value: Any) -> Iterator[str]:
    """All strings of a value, but the names in objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
