"""One tokenizer for all sources, over the `tokenizers` library.

Control tokens structure a text (<|im_end|>, <s>) and are no part of it. In a prompt they are tokens, because whoever
writes a prompt writes the structure, too; in a chat's messages they are ordinary text, because there the template
writes it. Added tokens that are not control (Qwen3's <think>) are words like others.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import tokenizers

from mpillm.text.bounds import CHUNK, MAX_CHARS, End, TooLongError, encoded_at_once
from mpillm.text.chat_formats.known import format_of
from mpillm.text.chat_formats.tagged import ChatFormat
from mpillm.text.chat_templates import ChatTemplates
from mpillm.text.constrain import Grammars
from mpillm.text.content import Message
from mpillm.text.decode import StopWatch
from mpillm.text.described import decoding, keeps_length
from mpillm.text.encode import Encoder, encoding, ends_around
from mpillm.text.parts import TokenizerParts
from mpillm.text.token_bytes import TokenBytes


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, parts: TokenizerParts) -> None:
        core = self._core = parts.core
        self._parts = parts
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.end_ids = parts.end_ids
        # `encode_special_tokens` makes text only of tokens that are marked as special.
        unmarked = [
            token for token in core.get_added_tokens_decoder().values() if token.content in parts.control
        ]
        named = parts.control - {token.content for token in unmarked}
        core.add_special_tokens([_special(token) for token in unmarked if not token.special])
        core.add_special_tokens(
            [tokenizers.AddedToken(content, special=True, normalized=False) for content in named]
        )
        self._added = {id: token.content for id, token in core.get_added_tokens_decoder().items()}
        self.control_ids = frozenset(id for id, content in self._added.items() if content in parts.control)
        unknown = getattr(core.model, "unk_token", None)
        self._unknown = {self._id_of("unk_token"), core.token_to_id(unknown) if unknown else None}
        self._encoder = Encoder(core, self._added, self.control_ids, self._unknown)
        self._kind, self.strips_space = decoding(core)
        self._bytes = TokenBytes(core, self._kind, self._added, self.control_ids)
        self._chats = ChatTemplates(parts, datetime.now)

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self._core.get_vocab().values()) + 1

    def vocabulary(self) -> dict[int, str]:
        """Return the text of each token in the tokenizer's file, by id."""
        return {id: token for token, id in self._core.get_vocab().items()}

    def tell_time(self, now: Callable[[], datetime]) -> None:
        """Chat templates that ask for the date get this one."""
        self._chats = ChatTemplates(self._parts, now)

    @property
    def by_bytes(self) -> bool:
        """Whether each token is a run of bytes, and a text is their concatenation."""
        return self._kind != "other"

    def is_control(self, id: int) -> bool:
        """Return whether the token is a control token, which is no part of the text."""
        return id in self.control_ids

    def encode(
        self,
        text: str,
        add_special: bool = True,
        parse_special: bool = False,
        max_tokens: int | None = None,
        end: End | None = None,
    ) -> list[int]:
        """Token ids of a text, or of its `end`, with BOS and EOS as the model wants them if `add_special`.

        Control tokens written in the text are ordinary text unless `parse_special`. Raise RequestError if the text is
        not Unicode (a lone surrogate), and TooLongError if it certainly has more than `max_tokens` tokens, which is
        found out without encoding all of it.
        """
        if end is not None:
            text = end.of(text)
        parts = self._parts
        own = add_special and parts.add_bos is None and parts.add_eos is None
        encode = self._encoder.whole if parse_special else self._encoder.plain
        if max_tokens is not None:
            self._check_length(text, max_tokens, encode)
        ids = encode(text, own)
        if add_special and parts.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special and parts.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The tokens that `encode` puts before and behind a text with `add_special`."""
        return ends_around(*(self.encode("a", own) for own in (False, True)))

    def max_chars(self, tokens: int) -> int:
        """Return the maximum number of characters that `tokens` tokens can stand for."""
        return MAX_CHARS if self._longest is None else min(tokens * self._longest, MAX_CHARS)

    @cached_property
    def _longest(self) -> int | None:
        """Characters of the longest token; None if a token may stand for any number of them."""
        unbounded = self._unknown - {None} and not getattr(self._core.model, "byte_fallback", False)
        if not self.by_bytes or unbounded or not keeps_length(self._core):
            return None
        return max(map(len, self._core.get_vocab()))

    def _check_length(self, text: str, max_tokens: int, encode: Callable[[str, bool], list[int]]) -> None:
        """Raise TooLongError if the text is certainly too long.

        A long text is counted in chunks. Their borders cut some tokens in two, which the bound allows for.
        """
        too_long = TooLongError(f"more than {max_tokens} tokens ({len(text)} characters)")
        if len(text) > self.max_chars(max_tokens):
            raise too_long
        if len(text) <= CHUNK:
            return
        count, maximum = 0, max_tokens + max_tokens // 8
        for start in range(0, len(text), CHUNK):
            count += len(encode(text[start : start + CHUNK], False))
            maximum += 64
            if count > maximum:
                raise too_long

    def decode(
        self,
        ids: Sequence[int],
        skip_special: bool = True,
        start: bool = True,
        final: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> str:
        """Return the text of ids, without control tokens if `skip_special`, except those in `shown`.

        Bytes that are no UTF-8 become U+FFFD; those at the end that only lack their rest are left out unless the
        text is `final`. `start` says that the text begins with these ids: a SentencePiece tokenizer puts a space
        before its first word, which is then removed.
        """
        if skip_special:
            ids = [id for id in ids if id in shown or not self.is_control(id)]
        if not self.by_bytes:
            text = self._core.decode(list(ids), skip_special_tokens=False)
            return text if final else text.rstrip("\ufffd")
        data = b"".join(map(self.token_bytes, ids))
        if start and self.strips_space:
            data = data.removeprefix(b" ")
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final)

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token; empty for ids beyond the tokenizer (models pad their vocabulary)."""
        return self._bytes.of(id)

    def token_text(self, id: int) -> str:
        """Return a token as text; bytes that are not whole characters become U+FFFD."""
        return self.token_bytes(id).decode("utf-8", errors="replace")

    @lru_cache(maxsize=2)  # noqa: B019 - a tokenizer lives as long as its process
    def grammars(self, vocab: int, end_ids: frozenset[int]) -> Grammars:
        """Return the object that makes answers obey grammars, for `vocab` tokens and texts that end with `end_ids`."""
        return Grammars(self._core.to_str(), max(vocab, self.vocab_size), end_ids)

    def watch(self, stops: Sequence[str], start: bool = True) -> StopWatch:
        """Return a new watcher for a request's stop strings; `start` as in `decode`."""
        return StopWatch(self, stops, start)

    @lru_cache(maxsize=2)  # noqa: B019 - a tokenizer lives as long as its process
    def chat_format(self, reasoning: str | tuple[str, str], tool_calls: str) -> ChatFormat:
        """Return the format of the model's answers to chats; the arguments are those of `format_of`."""
        return format_of(self._parts.templates.values(), self._added.values(), reasoning, tool_calls)

    @cached_property
    def control(self) -> dict[str, int]:
        """The control tokens with their ids."""
        return {self._added[id]: id for id in sorted(self.control_ids)}

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._parts.templates)

    def chat_reads(self, name: str) -> bool:
        """Return whether the chat template looks at a variable of this name, as far as its text says."""
        return self._chats.read(name)

    def encode_chat(
        self,
        messages: list[Message],
        options: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        add_special: bool = False,
        end: End | None = None,
    ) -> list[int]:
        """Return a chat, or its `end`, as token ids; control tokens come from the template alone (see `chat`).

        With `add_special` it has BOS and EOS as a text does, besides those that the template writes.
        Raise RequestError if the template fails, and TooLongError if the chat certainly has more than `max_tokens`
        tokens.
        """
        max_chars = MAX_CHARS if max_tokens is None else self.max_chars(max_tokens)
        pieces = self._chats.chosen(options).pieces(messages, options, max_chars)
        if isinstance(pieces, str):
            return self.encode(pieces, add_special, parse_special=True, max_tokens=max_tokens, end=end)
        if end is not None:
            pieces = end.of_pieces(pieces)
        head, tail = self.around if add_special else ([], [])
        return [*head, *self._encoder.mixed(pieces), *tail]

    def render_chat(self, messages: list[Message], options: Mapping[str, Any] | None = None) -> str:
        """Return a chat as one text, in which users' control tokens cannot be told from the template's."""
        return self._chats.chosen(options).render(messages, options)

    def encode_pair(
        self, text: str, other: str, max_tokens: int | None = None
    ) -> tuple[list[int], int | None]:
        """Return two texts joined as by the tokenizer, and where the second segment begins, if it is told apart.

        Control tokens in them are tokens, as in `transformers`.
        """
        if max_tokens is not None:
            for one in (text, other):
                self._check_length(one, max_tokens, self._encoder.whole)
        pair = encoding(self._core, (text, other), own=True, plain=False)
        return list(pair.ids), pair.type_ids.index(1) if 1 in pair.type_ids else None

    def beginning(self, text: str, tokens: int) -> str:
        """Return the part of a text that its first `tokens` tokens stand for."""
        text = End(encoded_at_once(tokens), last=False).of(text)
        found = encoding(self._core, text, own=False, plain=False).offsets[:tokens]
        return text[: max((end for _, end in found), default=0)]

    def encode_template(
        self, template: str, values: Mapping[str, str], max_tokens: int | None = None
    ) -> list[int]:
        """Return a template in which {name} stands for a value; control tokens come from the template alone."""
        if max_tokens is not None:
            for value in values.values():
                self._check_length(value, max_tokens, self._encoder.plain)
        marks = sorted((self._added[id] for id in self.control_ids), key=len, reverse=True)
        places = "|".join(map(re.escape, (*marks, *(f"{{{name}}}" for name in values))))
        pieces = [
            (values[part[1:-1]], False) if part[1:-1] in values and part[:1] == "{" else (part, part in marks)
            for part in re.split(f"({places})", template)
            if part
        ]
        return self._encoder.mixed(pieces)

    def template(self, name: str) -> str | None:
        """Return one of the model's chat templates by its name."""
        return self._parts.templates.get(name)

    def _id_of(self, name: str) -> int | None:
        content = self._parts.named.get(name)
        return None if content is None else self._core.token_to_id(content)


def _special(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )
