"""From token ids to text while they come: UTF-8 put together, stop strings found across token borders."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def by_bytes(self) -> bool: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True, start: bool = True) -> str: ...

    def token_bytes(self, id: int) -> bytes: ...

    def is_control(self, id: int) -> bool: ...

    @property
    def strips_space(self) -> bool: ...


class IncrementalDecoder:
    """Text of ids that come one by one: all pushed pieces and `finish()` together are `decode` of all ids.

    A character whose bytes are spread over tokens comes with its last token; what never becomes a character
    comes as U+FFFD. `start` says that the text begins here (a chat's answer): a SentencePiece tokenizer's
    first space is then none of the text's; without it the ids go on from a prompt, and the space counts.
    """

    def __init__(self, tokenizer: Decoder, skip_special: bool = True, start: bool = True) -> None:
        self._tokenizer, self._skip_special, self._start = tokenizer, skip_special, start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = start and tokenizer.strips_space
        self._ids: list[int] = []  # only for tokenizers whose tokens have no bytes of their own
        self._given = ""

    def push(self, id: int) -> str:
        """The text that this token completes, perhaps none."""
        if not self._tokenizer.by_bytes:
            self._ids.append(id)
            return self._more(final=False)
        if self._skip_special and self._tokenizer.is_control(id):
            return ""
        return self._utf8.decode(self._stripped(self._tokenizer.token_bytes(id)))

    def finish(self) -> str:
        """What is left when no more tokens come: replacement characters for bytes that lack their rest."""
        return self._utf8.decode(b"", final=True) if self._tokenizer.by_bytes else self._more(final=True)

    def _stripped(self, data: bytes) -> bytes:
        if self._strip and data:
            self._strip = False
            return data.removeprefix(b" ")
        return data

    def _more(self, final: bool) -> str:
        """Decode all again; what can still change (a last U+FFFD, text unlike what was given) waits for the end."""
        text = self._tokenizer.decode(self._ids, self._skip_special, self._start)
        if not text.startswith(self._given) or (text.endswith("\ufffd") and not final):
            return ""
        more = text[len(self._given) :]
        self._given = text
        return more


class StopStrings:
    """Passes text on until one of the stop strings is complete, holding back what may be the beginning of one.

    The stop string whose last character comes first wins (of those that end together, the one that begins first), so
    the answer does not depend on where tokens are cut. An empty stop string never stops.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that can no longer be part of a stop string, and whether one is complete (nothing comes after)."""
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
        """What was held back, now that no stop string can become complete."""
        held, self._held = self._held, ""
        return held

    def _open(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the text before the first complete stop string ends, None if there is none."""
    found = [(at + len(stop), at) for stop in stops if stop and (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first complete stop string, and whether there was one; as `StopStrings` finds it."""
    cut = find_stop(text, stops)
    return (text, False) if cut is None else (text[:cut], True)


class StopWatch:
    """Sees a request's tokens as they are generated and says when its text has reached a stop string."""

    def __init__(self, tokenizer: Decoder, stops: Sequence[str], start: bool = True) -> None:
        self._decoder = IncrementalDecoder(tokenizer, start=start)
        self._stops = StopStrings(stops)
        self._text: list[str] = []
        self.tokens = 0

    def __call__(self, token: int, /) -> bool:
        """True when a stop string is complete; the token that completed it is counted, its text after it lost."""
        self.tokens += 1
        text, stopped = self._stops.push(self._decoder.push(token))
        self._text.append(text)
        return stopped

    def finish(self) -> str:
        """The text before the stop string, or all of it."""
        if not self._stops.stopped:
            text, _ = self._stops.push(self._decoder.finish())
            self._text.append(text + self._stops.finish())
        return "".join(self._text)
