"""Count the tokens of an input's texts: those of its first part; the rest is bounded by its bytes.

All token ids of prompts are counted. In the first part, blocks that prompts have in common are counted too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from mpillm.errors import RequestError
from mpillm.kernels import KV_BLOCK
from mpillm.text import Tokenizer

COUNTED = 1 << 20  # the first bytes of the input, which are tokenized; that takes some tenths of a second
BYTES_PER_TOKEN = 4  # an estimate for models without a tokenizer
SPECIAL = 4  # tokens that a tokenizer puts around a text
IDS = re.compile(rb"\s*\[[\[\s]*[-0-9]")  # the begin of a prompt of token ids, or of several


class Tokens(NamedTuple):
    """The likely and the maximum number of tokens, and the tokens of each text, if all were counted.

    `shared` of the likely tokens are in blocks of the KV cache that earlier texts have too. `alike` texts have such
    blocks, and `own` has the tokens of each text after its shared blocks. `again`: a chat's texts are those of an
    earlier chat.
    """

    likely: int
    maximum: int
    texts: tuple[int, ...] = ()
    shared: int = 0
    alike: int = 0
    own: tuple[int, ...] = ()
    again: bool = False


class Around(NamedTuple):
    """The bytes that the files of a model add to texts, and how the model reads pairs."""

    template: int = 0  # bytes of the chat template
    prompt: int = 0  # maximum bytes before a text that gets an embedding
    apart: bool = False  # the two texts of a pair are read separately, and each gets an embedding


NOTHING = Around()


class TokenCounter:
    """Counts tokens with the tokenizer of the model, if it has one. The first text loads the tokenizer."""

    def __init__(self, load: Callable[[], Tokenizer | None], shares: bool = True) -> None:
        """`load` returns the tokenizer; `shares`: texts with a common beginning share its blocks."""
        self._load, self._shares = load, shares
        self._bytes = self._tokens = self._shared = 0  # the sums of all texts that were counted
        # For each block, a hash of it and all blocks before it; for each chat, one of all its texts.
        self._begun = set[int]()

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return self._load()

    def count(self, value: bytes, chat: bool = False) -> Tokens:
        """Return the tokens of all texts in a JSON value, with those that the tokenizer adds. A chat is one text."""
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
            return Tokens(0, len(value))  # the line gets an error in the run
        return self._noted(value, found)

    def count_ids(self, value: bytes) -> Tokens:
        """Return the tokens of all lists of token ids in a JSON value."""
        tokens = value.count(b",") + 1
        if self._bytes + len(value) > COUNTED:
            return Tokens(tokens, tokens, shared=tokens * self._shared // max(self._tokens, 1))
        try:
            lists: Any = msgspec.json.decode(value)
            found = self._found(lists if isinstance(lists[0], list) else [lists], chat=False)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError):
            return Tokens(tokens, tokens)  # the line gets an error in the run
        return self._noted(value, found)

    def _noted(self, value: bytes, found: Tokens) -> Tokens:
        self._bytes, self._tokens = self._bytes + len(value), self._tokens + found.likely
        self._shared += found.shared
        return found

    def longest(self, value: bytes) -> int:
        """Return the tokens of the longest text in a JSON value, or the bytes of the value if texts are not counted."""
        found = self.count(value)
        return max(found.texts, default=len(value))

    def _found(self, texts: list[list[int]], chat: bool) -> Tokens:
        lengths = tuple(map(len, texts))
        whole = [[id for ids in texts for id in ids]] if chat else texts
        known = [KV_BLOCK * self._known_blocks(ids) for ids in whole]
        own = tuple(len(ids) - tokens for ids, tokens in zip(whole, known, strict=True))
        again = False
        if chat and self._shares:
            key = hash(("chat", *lengths, *whole[0]))
            again = key in self._begun
            self._begun.add(key)
        return Tokens(sum(lengths), sum(lengths), lengths, sum(known), sum(map(bool, known)), own, again)

    def _known_blocks(self, ids: list[int]) -> int:
        """Return the number of blocks of a text that were seen before, after the same tokens; others are noted.

        The block of the last token does not count, because that token is computed in any case.
        """
        before, known = 0, 0
        if not self._shares:
            return 0
        for start in range(0, len(ids) - KV_BLOCK + 1, KV_BLOCK):
            before = hash((before, *ids[start : start + KV_BLOCK]))
            known += before in self._begun and start + KV_BLOCK < len(ids)
            self._begun.add(before)
        return known


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings of a value except the names in objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
