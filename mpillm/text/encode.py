"""Text to token ids over the `tokenizers` library, where control tokens in a text are tokens or ordinary text."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache, partial

import tokenizers

from mpillm import tracing
from mpillm.errors import RequestError
from mpillm.text.bounds import CHUNK
from mpillm.text.interruptible import interruptible
from mpillm.text.marks import unused_mark


class Encoder:
    """Encodes texts with a tokenizer of the library that has the tokens `added`, and among them the ids `control`."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        added: Mapping[int, str],
        control: frozenset[int],
        unknown: Collection[int | None],
    ) -> None:
        self._core, self._added, self._control, self._unknown = core, added, control, unknown

    def whole(self, text: str, own: bool) -> list[int]:
        """Return ids of a text in which control tokens are tokens; `own`: the post-processor adds its own."""
        return _ids(self._core, text, own, plain=False)

    def plain(self, text: str, own: bool) -> list[int]:
        """Return ids of a text without control tokens; `own` lets the post-processor add its own around them."""
        ids = _ids(self._core, text, False, plain=True)
        ids = [part for id in ids for part in self.spelled(id)]
        if not own:
            return ids
        head, tail = self.around
        return [*head, *ids, *tail]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The tokens that the post-processor puts before and after a text."""
        return ends_around(*(_ids(self._core, "a", own, plain=True) for own in (False, True)))

    def spelled(self, id: int) -> list[int]:
        """Return the token itself, or its characters if it is a control token, which merges may produce too."""
        if id not in self._control or id in self._unknown:
            return [id]
        spelled = [part.id for char in self._added[id] for part in self._core.model.tokenize(char)]
        return [part for part in spelled if part not in self._control]

    def mixed(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Return ids of pieces of one text: control tokens where a piece says so, ordinary text elsewhere.

        They are encoded at once, so that the tokenizer does what it does at the beginning of a text and beside control
        tokens: each control token is replaced by an alias that no text contains and that a copy of the tokenizer knows.
        """
        mark = unused_mark(text for text, _ in pieces)
        if mark is None:
            raise RequestError("The messages use every noncharacter of Unicode; remove one.")
        core, aliases, originals = self._aliased(mark)
        text = "".join(aliases[text] if control else text for text, control in pieces)
        found = []
        for id in _ids(core, text, False, plain=True):
            found += [originals[id]] if id in originals else self.spelled(id)
        return found

    @lru_cache(maxsize=2)  # noqa: B019 - a tokenizer lives as long as its process
    def _aliased(self, char: str) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """Return a copy of the tokenizer with an alias for each control token, aliases by content, ids by alias id."""
        core = tokenizers.Tokenizer.from_str(self._core.to_str())
        tokens = [token for id, token in self._core.get_added_tokens_decoder().items() if id in self._control]
        aliases = {token.content: f"{char}{number}{char}" for number, token in enumerate(tokens)}
        core.add_tokens(
            [
                tokenizers.AddedToken(
                    aliases[token.content],
                    single_word=False,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=False,  # so that it is found where special tokens are not
                )
                for token in tokens
            ]
        )
        originals = {}
        for content, alias in aliases.items():
            id, new = self._core.token_to_id(content), core.token_to_id(alias)
            assert id is not None
            assert new is not None
            originals[new] = id
        return core, aliases, originals


def ends_around(bare: list[int], full: list[int]) -> tuple[list[int], list[int]]:
    """Return the tokens before `bare` in `full`, and those behind it."""
    at = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)
    return full[:at], full[at + len(bare) :]


def _ids(core: tokenizers.Tokenizer, text: str, own: bool, plain: bool) -> list[int]:
    """Return ids of a text; with `plain` control tokens in it are text, with `own` the post-processor adds its own."""
    return list(encoding(core, text, own, plain).ids)


def encoding(
    core: tokenizers.Tokenizer, text: str | tuple[str, str], own: bool, plain: bool
) -> tokenizers.Encoding:
    """Encode a text or a pair of texts; the arguments are those of `_ids`. RequestError if a text is not Unicode."""
    texts = [text] if isinstance(text, str) else list(text)
    for one in texts:
        if one.isascii():
            continue
        try:
            one.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The text is not Unicode: it has a lone surrogate, U+{ord(one[error.start]):04X}, at {error.start}."
            ) from error
    core.encode_special_tokens = plain
    if sum(map(len, texts)) <= CHUNK:
        with tracing.span("tokenize", characters=sum(map(len, texts))):
            return core.encode(texts[0], texts[1] if len(texts) > 1 else None, add_special_tokens=own)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is one text
    # Unlike `encode`, this releases the interpreter lock.
    encode = partial(core.encode_batch_fast, [text], add_special_tokens=own)
    with tracing.span("tokenize", characters=len(texts[0])):
        return interruptible(encode)[0]
