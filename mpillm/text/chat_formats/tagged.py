"""A chat format: where reasoning, content and tool calls stand in the text of one answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpillm.text.chat_formats.base import CallFormat, ParsedAnswer, Tool, without_open_end
from mpillm.text.chat_formats.lark import Lark

_TOKENS = re.compile("<\\|[^<>]+>|\uff5c[^\uff5c]+\uff5c")  # parts of marks in some vocabularies

#: of the answer's beginning: the prompt has opened the reasoning, has closed it, or has done neither
ReasoningState = Literal["open", "closed", "free"]


@dataclass(frozen=True)
class AnswerRule:
    """The form of an answer: an expression for its content, if any, and the calls of tools that it may have."""

    answer: str | None
    tools: Sequence[Tool]
    choice: Literal["none", "auto", "required"]
    many: bool = True  # calls


class ChatFormat:
    """The format of a model's answers."""

    #: strings that a text must show to be split, also where they are control tokens
    marks: tuple[str, ...]
    id_length: int

    has_reasoning: bool  # whether reasoning can be told from content
    has_calls: bool  # whether the format of tool calls is known

    def state(self, prompt: str) -> ReasoningState:
        """Return the state at the beginning of an answer, by the end of its prompt."""
        raise NotImplementedError

    def continued(self, content: str) -> ReasoningState:
        """Return the state at the beginning of an answer that continues a message with this content."""
        raise NotImplementedError

    def thinks(self, state: ReasoningState) -> bool:
        """Return whether there may be reasoning before the content."""
        raise NotImplementedError

    def split(
        self, text: str, state: ReasoningState, tools: Sequence[Tool] | None, final: bool
    ) -> ParsedAnswer:
        """Return the parts of an answer, in which calls are looked for if there are `tools`.

        Unless `final`, more of it will come, and what cannot be told yet is in no part.
        """
        raise NotImplementedError

    def expression(self, lark: Lark, state: ReasoningState, asked: AnswerRule) -> str:
        """Return the grammar of an answer whose content or calls are held to something."""
        raise NotImplementedError


class Tagged(ChatFormat):
    """Reasoning between two tags at the answer's beginning, and calls as `calls` writes them; either may be None.

    What is said behind the reasoning may stand between the tags of `frame`.
    """

    def __init__(
        self, tags: tuple[str, str] | None, calls: CallFormat | None, frame: tuple[str, str] | None = None
    ) -> None:
        self.tags, self.calls, self.frame = tags, calls, frame
        marks = (*(tags or ()), *(calls.marks if calls else ()))
        self.marks = (*marks, *(token for mark in marks for token in _TOKENS.findall(mark) if token != mark))
        self.has_reasoning = tags is not None
        self.has_calls = calls is not None
        self.id_length = calls.id_length if calls else 24

    def state(self, prompt: str) -> ReasoningState:
        if self.tags is None:
            return "closed"
        opening, closing = self.tags
        end = prompt.rstrip()
        return "open" if end.endswith(opening.rstrip()) else "closed" if end.endswith(closing) else "free"

    def continued(self, content: str) -> ReasoningState:
        if self.tags is None:
            return "closed"
        _, opened, behind = content.rpartition(self.tags[0])
        return "open" if opened and self.tags[1] not in behind else "closed"

    def thinks(self, state: ReasoningState) -> bool:
        return self.tags is not None and state != "closed"

    def split(
        self, text: str, state: ReasoningState, tools: Sequence[Tool] | None, final: bool
    ) -> ParsedAnswer:
        reasoning, rest = self._thought(text, state, final)
        if rest is not None and self.frame is not None:
            rest = _unframed(rest, self.frame, final)
        if rest is None:
            return ParsedAnswer(reasoning, "")
        if not tools or self.calls is None:
            return ParsedAnswer(reasoning, rest)
        content, calls = self.calls.split(rest, tools, final)
        if calls or not final:
            content = content.rstrip()
        return ParsedAnswer(reasoning, content, tuple(calls))

    def _thought(self, text: str, state: ReasoningState, final: bool) -> tuple[str | None, str | None]:
        """Return the reasoning and the text after it; None if no text follows yet."""
        if self.tags is None or state == "closed":
            return None, text
        opening, closing = self.tags
        stripped = text.lstrip()
        if stripped.startswith(opening):
            stripped = stripped[len(opening) :]
        elif state == "free":
            open_yet = not final and opening.startswith(stripped)
            return None, None if open_yet else text
        elif not final and opening.startswith(stripped.rstrip()):
            return None, None
        thought, closed, rest = stripped.partition(closing)
        if closed:
            return thought.strip(), rest.lstrip("\n")
        if not final:
            thought = without_open_end(thought, (closing,)).rstrip()
        return thought.strip(), None

    def expression(self, lark: Lark, state: ReasoningState, asked: AnswerRule) -> str:
        ways = [asked.answer] if asked.answer else []
        if asked.tools:
            assert self.calls is not None
            if asked.choice == "required" or asked.answer:
                ways.append(self.calls.required(lark, asked.tools, asked.many))
            else:
                ways.append(self.calls.optional(lark, asked.tools, asked.many))
        answer = lark.rule(" | ".join(ways))
        if self.tags is None or state == "closed":
            return answer
        opening, closing = self.tags
        thought = f"{lark.until(closing)} /\\n{{0,2}}/"
        return f"{thought} {answer}" if state == "open" else f"({lark.literal(opening)} {thought})? {answer}"


def _unframed(text: str, frame: tuple[str, str], final: bool) -> str | None:
    """Return the content of a frame, if the text begins with one; None if it may still do so."""
    opening, closing = frame
    stripped = text.lstrip()
    if not stripped.startswith(opening):
        return None if not final and opening.startswith(stripped) else text
    inner, closed, _ = stripped[len(opening) :].lstrip("\n").partition(closing)
    if not (closed or final):
        inner = without_open_end(inner, (closing, f"\n{closing}"))
    return inner.removesuffix("\n") if closed or not final else inner
