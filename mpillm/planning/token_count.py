"""How many tokens the texts of an input are: counted in its first part, and bounded by their bytes behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from mpillm.errors import RequestError
from mpillm.kernels import KV_BLOCK
from mpillm.text import Tokenizer

COUNTED = 1 << 20  # bytes of the part that is tokenized: some tenths of a second
BYTES_PER_TOKEN = 4  # of a text, by an estimate where there is no tokenizer
SPECIAL = 4  # tokens that one puts around a text


class Tokens(NamedTuple):
    """The number of tokens: an estimate, and the most there can be; and of each text, if all were counted.

    `shared` of the likely ones fill blocks of the KV cache that begin as earlier ones did, in `alike` of the texts.
    """

    likely: int
    maximum: int
    texts: tuple[int, ...] = ()
    shared: int = 0
    alike: int = 0


class Around(NamedTuple):
    """Bytes of what a model's files put around texts, and how it reads pairs."""

    template: int = 0  # for chats
    prompt: int = 0  # before a text that gets an embedding, at most
    apart: bool = False  # whether the two texts of a pair are read apart, as others that get embeddings


NOTHING = Around()


class TokenCounter:
    """Counts tokens with the model's tokenizer, if it has one: it is loaded for the first text."""

    def __init__(self, load: Callable[[], Tokenizer | None]) -> None:
        self._load = load
        self._bytes = self._tokens = self._shared = 0  # of what was counted
        self._begun = set[int]()  # hashes of all blocks, each with what stands before it

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return self._load()

    def count(self, value: bytes, chat: bool = False) -> Tokens:
        """The tokens of all texts in a value of JSON, with what the tokenizer puts around them.

        The texts of a chat become one.
        """
        if self._bytes + len(value) > COUNTED:
            maximum = len(value) + SPECIAL * value.count(b'"') // 2
            counted = max(self._bytes, 1)
            likely, shared = (len(value) * count // counted for count in (self._tokens, self._shared))
            return Tokens(likely, maximum, shared=shared)
        try:
            texts = list(_texts(msgspec.json.decode(value)))
            if self._tokenizer is None:
                likely = -(-sum(map(len, texts)) // BYTES_PER_TOKEN)
                found = Tokens(likely, len(value) + SPECIAL * len(texts))
            else:
                found = self._found([self._tokenizer.encode(text) for text in texts], chat)
        except (RequestError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return Tokens(0, len(value))  # an error of that line
        self._bytes, self._tokens = self._bytes + len(value), self._tokens + found.likely
        self._shared += found.shared
        return found

    def longest(self, value: bytes) -> int:
        """Tokens of the longest text in a value of JSON, or its characters where they are not counted."""
        found = self.count(value)
        return max(found.texts, default=len(value))

    def _found(self, texts: list[list[int]], chat: bool) -> Tokens:
        lengths = tuple(map(len, texts))
        whole = [[id for ids in texts for id in ids]] if chat else texts
        known = list(map(self._known_blocks, whole))
        return Tokens(sum(lengths), sum(lengths), lengths, KV_BLOCK * sum(known), sum(map(bool, known)))

    def _known_blocks(self, ids: list[int]) -> int:
        """How many blocks of a text begin as earlier ones did; the others are known from now on."""
        before, known = 0, 0
        for start in range(0, len(ids) - KV_BLOCK + 1, KV_BLOCK):
            before = hash((before, *ids[start : start + KV_BLOCK]))
            known += before in self._begun
            self._begun.add(before)
        return known


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
