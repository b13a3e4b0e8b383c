"""Calls that begin with a mark, wherever in an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpillm.text.chat_formats.base import Call, CallFormat, Tool, without_open_end
from mpillm.text.chat_formats.lark import Lark


@dataclass(frozen=True)
class Framed(CallFormat):
    """Calls between `begin` and `end` (which may be empty), in a frame around all of them or around `each`."""

    begin: str
    end: str
    frame: tuple[str, str] = ("", "")
    each: bool = False
    between: str = ""  # two calls, as models write them
    id_length: int = 24

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(mark for mark in (self.begin, self.end, *map(str.strip, self.frame)) if mark)

    def read(self, text: str, at: int, tools: Sequence[Tool], final: bool) -> tuple[list[Call], int] | None:
        """Return the calls after a `begin` that ends at `at`, and where they end; None if there is no whole one."""
        raise NotImplementedError

    def write(self, tool: Tool, lark: Lark) -> str:
        """Return the expression of what stands between `begin` and `end` in calls of a tool."""
        raise NotImplementedError

    def split(self, text: str, tools: Sequence[Tool], final: bool) -> tuple[str, list[Call]]:
        content: list[str] = []
        calls: list[Call] = []
        at = 0
        while (found := text.find(self.begin, at)) >= 0:
            content.append(text[at:found])
            read = self.read(text, found + len(self.begin), tools, final)
            if read is None and not final:
                return self._content(content, calls, final), calls
            if read is None:
                content.append(self.begin)
                at = found + len(self.begin)
            else:
                calls += read[0]
                at = read[1]
        rest = text[at:]
        content.append(rest if final else without_open_end(rest, self.marks))
        return self._content(content, calls, final), calls

    def _content(self, pieces: list[str], calls: list[Call], final: bool) -> str:
        """Return the text around the calls, without frames; a frame without a call after it is text at the end."""
        text = "".join(pieces)
        marks = [mark for mark in map(str.strip, self.frame) if mark]
        if not calls:
            return text if final or not marks else text.partition(marks[0])[0]
        for mark in marks:
            text = text.replace(mark, "")
        return text

    def required(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        return self._calls(lark, tools, many, self.frame[0] + self.begin)

    def optional(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        begin = self.frame[0] + self.begin
        trigger = self.frame[0].strip() or self.begin
        again = many and not self.each and bool(self.frame[0])
        calls = self._calls(lark, tools, again, begin.removeprefix(trigger))
        unit = lark.rule(f"{lark.until(trigger)} {calls}")
        return f"{unit}* ANY" if many else f"({unit} | ANY)"

    def _calls(self, lark: Lark, tools: Sequence[Tool], many: bool, begin: str) -> str:
        """Return one call, or one or more, with `begin` before the first; what belongs together is one literal.

        A lexeme that another one begins with would be taken for it.
        """
        end = self.end + (self.frame[1] if self.each else "")
        after = "" if self.each else lark.literal(self.frame[1])
        again = self.between + (self.frame[0] if self.each else "") + self.begin
        more = f"({self._call(lark, tools, again, end)})*" if many else ""
        return f"{self._call(lark, tools, begin, end)} {more} {after}"

    def _call(self, lark: Lark, tools: Sequence[Tool], begin: str, end: str) -> str:
        ways = (f"{lark.literal(begin)} {self.write(tool, lark)} {lark.literal(end)}" for tool in tools)
        return lark.rule(" | ".join(ways))
