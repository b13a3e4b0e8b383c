"""Harmony, the chat format of gpt-oss: what a model thinks and what it says lie in channels of one answer.

An answer is messages `<|start|>assistant<|channel|>NAME<|message|>TEXT<|end|>`; the prompt has begun the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

START, CHANNEL, MESSAGE, END = MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
ANALYSIS = "analysis"  # the channel of what a model thinks

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Harmony:
    """The format with a tokenizer's ids of its marks."""

    ids: Mapping[str, int]

    def split(self, tokens: Sequence[int], decode: Decode) -> tuple[str | None, str]:
        """What the model thought (None if it did not) and what it said. Tokens without marks are what it said."""
        thought: list[str] = []
        said: list[str] = []
        for channel, text in self._messages(tokens, decode):
            (thought if channel == ANALYSIS else said).append(text)
        return "\n".join(thought) if thought else None, "\n".join(said)

    def _messages(self, tokens: Sequence[int], decode: Decode) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        channel, part, place = "", list[int](), MESSAGE
        marks = {id: mark for mark, id in self.ids.items()}
        for token in [*tokens, self.ids[END]]:
            mark = marks.get(token)
            if mark is None:
                part.append(token)
                continue
            if place == CHANNEL:  # the name, perhaps with whom it is to
                channel = (decode(part).split() or [""])[0]
            elif place == MESSAGE and part:
                found.append((channel, decode(part)))
            part, place = [], mark
            if mark == START:
                channel = ""
        return found
