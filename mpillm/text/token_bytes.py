"""The bytes that tokens stand for."""

from __future__ import annotations

from collections.abc import Mapping

import tokenizers

from mpillm.text.described import BYTE_OF, BYTE_TOKEN, Decoding


class TokenBytes:
    """The bytes of the tokens of `core`, by id; each is found once."""

    def __init__(
        self, core: tokenizers.Tokenizer, kind: Decoding, added: Mapping[int, str], control: frozenset[int]
    ) -> None:
        """`added` has the content of tokens beside the vocabulary, `control` the ids of control tokens."""
        self._core, self._kind, self._added, self._control = core, kind, added, control
        self._known: dict[int, bytes] = {}

    def of(self, id: int) -> bytes:
        """Return the bytes of a token; none for an id that the tokenizer does not have."""
        found = self._known.get(id)
        if found is None:
            found = self._known[id] = self._find(id)
        return found

    def _find(self, id: int) -> bytes:
        if id in self._control:
            return self._added[id].encode()
        token = self._core.id_to_token(id)
        if token is None:
            return b""
        if self._kind == "byte_level" and id not in self._added and all(char in BYTE_OF for char in token):
            return bytes(BYTE_OF[char] for char in token)
        if self._kind == "sentencepiece":
            if BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()
        return token.encode()
