"""Harmony, the chat format of gpt-oss: what a model thinks and what it says lie in channels of one answer.

An answer is messages `<|start|>assistant<|channel|>NAME<|message|>TEXT<|end|>`; the prompt has begun the first one. A
message to a function, `<|channel|>commentary to=functions.NAME<|message|>{...}`, is a tool call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mpillm.text.chat_formats.base import Call, ParsedAnswer, Tool, call_of, decode_json, without_open_end
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.chat_formats.tagged import AnswerRule, ChatFormat, ReasoningState

START, CHANNEL, MESSAGE, END = MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
CONSTRAIN, CALL = "<|constrain|>", "<|call|>"
ANALYSIS = "analysis"  # the channel of what a model thinks
NAME = re.compile(r"<\|channel\|>\s*(\S*)")
RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")


class Harmony(ChatFormat):
    """The format of models whose vocabulary has its marks."""

    marks = (*MARKS, CONSTRAIN, CALL)
    id_length = 24
    has_reasoning = True
    has_calls = True

    def state(self, prompt: str) -> ReasoningState:
        return "open"

    def continued(self, content: str) -> ReasoningState:
        return "closed"

    def thinks(self, state: ReasoningState) -> bool:
        return state == "open"

    def split(
        self, text: str, state: ReasoningState, tools: Sequence[Tool] | None, final: bool
    ) -> ParsedAnswer:
        """Return the reasoning, the text and the calls of an answer; text without marks counts as text."""
        thought: list[str] = []
        said: list[str] = []
        calls: list[Call] = []
        if not final:
            text = without_open_end(text, self.marks)
        for channel, function, part, whole in _messages(text):
            found = decode_json(part, 0) if function and tools else None
            call = None if function is None or found is None else call_of(function, found[0])
            if call is not None:
                calls += [call] if whole or final else []
            elif channel == ANALYSIS:
                thought.append(part)
            elif not (function and tools) or final:
                said.append(part)
        return ParsedAnswer("\n".join(thought) if thought else None, "\n".join(said), tuple(calls))

    def expression(self, lark: Lark, state: ReasoningState, asked: AnswerRule) -> str:
        """Any number of thoughts, and then the answer in the last channel, or a call."""
        channel, end = lark.literal(CHANNEL), lark.literal(f"{END}{START}assistant")
        thoughts = f'({channel} ("{ANALYSIS}" | "commentary") {lark.literal(MESSAGE)} ANY {end})*'
        last = f'{channel} "final" {lark.literal(MESSAGE)}'
        ways = [f"{last} {asked.answer or 'ANY'}"] if asked.choice != "required" else []
        for tool in asked.tools:
            head = lark.literal(f"{CHANNEL}commentary to=functions.{tool.name} {CONSTRAIN}json{MESSAGE}")
            ways.append(f"{head} {lark.schema(tool.parameters, tool.strict)}")
        return f"{thoughts} {lark.rule(' | '.join(ways))}"


def _messages(text: str) -> Iterator[tuple[str, str | None, str, bool]]:
    """Yield each message's channel, the function that it is to, if any, its text, and whether its end is there."""
    pieces = re.split("(" + "|".join(map(re.escape, (*MARKS, CALL))) + ")", text.replace(CONSTRAIN, " "))
    header, place = "", START if RECIPIENT.search(pieces[0]) and len(pieces) > 1 else MESSAGE
    for piece, mark in zip(pieces[::2], [*pieces[1::2], None], strict=True):
        if place == MESSAGE:
            if piece:
                name, to = NAME.search(header), RECIPIENT.search(header)
                yield name[1] if name else "", to[1] if to else None, piece, mark is not None
            header = ""
        elif place in (START, CHANNEL):
            header += f"{place}{piece}"
        place = mark or place
