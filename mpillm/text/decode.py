"""From token ids to text, one by one: UTF-8 is put together, stop strings are found across token borders."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """The part of a tokenizer that decoding needs."""

    @property
    def by_bytes(self) -> bool: ...

    def decode(
        self,
        ids: Sequence[int],
        skip_special: bool = True,
        start: bool = True,
        final: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> str: ...

    def token_bytes(self, id: int) -> bytes: ...

    def is_control(self, id: int) -> bool: ...

    @property
    def strips_space(self) -> bool: ...


class IncrementalDecoder:
    """The text of ids that come one by one: all pushed pieces and `finish()` together equal `decode` of all ids.

    A character whose bytes are spread over several tokens comes with the last of them; bytes that never become a
    character come as U+FFFD. `start` says that the text begins here (a chat's answer): the first space of a
    SentencePiece tokenizer is then removed. Otherwise the ids continue a prompt, and the space is kept. Control tokens
    in `shown` are part of the text in any case.
    """

    def __init__(
        self,
        tokenizer: TokenDecoder,
        skip_special: bool = True,
        start: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer, self._skip_special, self._start = tokenizer, skip_special, start
        self._shown = shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = start and tokenizer.strips_space
        self._ids: list[int] = []  # used only if tokens are not runs of bytes
        self._given = ""

    def push(self, id: int) -> str:
        """Return the text that this token completes, which may be empty."""
        if not self._tokenizer.by_bytes:
            self._ids.append(id)
            return self._more(final=False)
        if self._skip_special and self._tokenizer.is_control(id) and id not in self._shown:
            return ""
        return self._utf8.decode(self._stripped(self._tokenizer.token_bytes(id)))

    def finish(self) -> str:
        """Return the text that remains when no more tokens come: U+FFFD for the bytes of an incomplete character."""
        return self._utf8.decode(b"", final=True) if self._tokenizer.by_bytes else self._more(final=True)

    def _stripped(self, data: bytes) -> bytes:
        if self._strip and data:
            self._strip = False
            return data.removeprefix(b" ")
        return data

    def _more(self, final: bool) -> str:
        """Decode all ids again; text that can still change (a last U+FFFD, a changed beginning) waits for the end."""
        text = self._tokenizer.decode(self._ids, self._skip_special, self._start, shown=self._shown)
        if not text.startswith(self._given) or (text.endswith("\ufffd") and not final):
            return ""
        more = text[len(self._given) :]
        self._given = text
        return more


class StopStrings:
    """Passes text on until a stop string is complete, and holds back what may be the beginning of one.

    The stop string whose last character comes first wins; of those that end together, the one that begins first. The
    answer therefore does not depend on where tokens are cut. An empty stop string never stops.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that cannot be part of a stop string any more, and whether one is complete (the end)."""
        if self.stopped:
            return "", True
        text = self._held + text
        cut = find_stop(text, self._stops)
        if cut is not None:
            self._held, self.stopped = "", True
            return text[:cut], True
        hold = self._open(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def finish(self) -> str:
        """Return the text that was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _open(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the position at which the first complete stop string begins; None if there is none."""
    found = [(at + len(stop), at) for stop in stops if stop and (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first complete stop string (see `StopStrings`), and whether there is one."""
    cut = find_stop(text, stops)
    return (text, False) if cut is None else (text[:cut], True)


class StopWatch:
    """Watches the tokens of a request as they are generated, and says when its text contains a stop string."""

    def __init__(
        self,
        tokenizer: TokenDecoder,
        stops: Sequence[str],
        start: bool = True,
        skip_special: bool = True,
        after: int = 0,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """No stop string counts that begins in the text of the first `after` tokens."""
        self._decoder = IncrementalDecoder(tokenizer, skip_special, start, shown)
        self._stops, self._after = StopStrings(stops), after
        self._text: list[str] = []
        self.tokens = 0

    def __call__(self, token: int, /) -> bool:
        """True when a stop string is complete; the token that completes it is counted, and text after it is dropped."""
        self.tokens += 1
        text, stopped = self._decoder.push(token), False
        if self.tokens > self._after:
            text, stopped = self._stops.push(text)
        self._text.append(text)
        return stopped

    def finish(self) -> str:
        """Return the text before the stop string, or all text if there is none."""
        if not self._stops.stopped:
            text, _ = self._stops.push(self._decoder.finish())
            self._text.append(text + self._stops.finish())
        return "".join(self._text)
