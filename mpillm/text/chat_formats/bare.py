"""Tool calls that are the whole answer, without a mark that would tell them from text."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpillm.text.chat_formats.base import Call, CallFormat, Tool, call_of, decode_json, without_open_end
from mpillm.text.chat_formats.in_json import LLAMA_KEYS, call_of_object, written_object
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.chat_formats.schemas import definitions

CALL_KEYS = ("name", "arguments", "parameters", "type", "id")  # the first key of a call's object
LITERALS = {"true": True, "false": False, "null": None}  # the literals of JSON


@dataclass(frozen=True)
class BareObjects(CallFormat):
    """Objects {"name": ..., "parameters": ...} anywhere in an answer, as Llama 3 writes them, if of known tools."""

    mark: str = "<|python_tag|>"

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.mark,)

    def split(self, text: str, tools: Sequence[Tool], final: bool) -> tuple[str, list[Call]]:
        names = {tool.name for tool in tools}
        content: list[str] = []
        calls: list[Call] = []
        at = begin = 0  # where the search is, and where text that is not yet content begins
        while (at := text.find("{", at)) >= 0:
            found = decode_json(text, at)
            if found is None and not final and _may_call(text[at + 1 :].lstrip()):
                break
            call = None if found is None else call_of_object(found[0])
            stop = at + 1 if found is None else found[1]
            if call is not None and call.name in names:
                content.append(text[begin:at])
                calls.append(call)
                begin = stop
            at = stop
        rest = text[begin:] if at < 0 else text[begin:at]
        content.append(rest if final else without_open_end(rest, self.marks))
        if not calls:
            shown = content[0] if final else content[0].partition(self.mark)[0]
            return shown if final or shown.strip() else "", []
        first, *others = (piece.replace(self.mark, "") for piece in content)
        return "".join([first if first.strip() else "", *(piece.lstrip(" \n;,") for piece in others)]), calls

    def required(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        one = lark.rule(" | ".join(written_object(tool, lark, LLAMA_KEYS) for tool in tools))
        return f'{one} ("; " {one})*' if many else one

    def optional(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        keys = "|".join(CALL_KEYS)
        other = lark.terminal(f'/(?s:.*)/ & ~/(?s:.*)\\{{[ \\n\\t]*"({keys})"(?s:.*)/')
        return f"({self.required(lark, tools, many)} | {other})"


def _may_call(rest: str) -> bool:
    """Return whether what stands behind a brace may be the beginning of a call."""
    return any(rest.startswith(f'"{key}"') or f'"{key}"'.startswith(rest) for key in CALL_KEYS)


@dataclass(frozen=True)
class Pythonic(CallFormat):
    """A list of calls as Python writes them, [weather(city="Rome", days=3)]; or, if `lines`, a line for each.

    An answer is calls if all of it is, or what stands between the marks, and they are of known tools.
    """

    marks: tuple[str, ...] = ("<|python_start|>", "<|python_end|>")
    marked: bool = False  # the model writes the marks
    lines: bool = False

    def split(self, text: str, tools: Sequence[Tool], final: bool) -> tuple[str, list[Call]]:
        at = text.find(self.marks[0])
        if at < 0 and not self.lines and text.strip().startswith("["):
            at = 0
        if not final:
            shown = text[:at] if at >= 0 else without_open_end(text, self.marks)
            return ("" if not shown.strip() else shown), []
        if at < 0:
            return text, []
        body, _, rest = text[at:].removeprefix(self.marks[0]).partition(self.marks[-1])
        calls = self._read(body.strip())
        if not calls or not {call.name for call in calls} <= {tool.name for tool in tools}:
            return text, []
        return text[:at] + rest, calls

    def _read(self, text: str) -> list[Call] | None:
        """Return the calls that a text consists of; None if it is not just calls."""
        calls = self._calls_of(text)
        return self._calls_of(text.replace("\n", "\\n")) if calls is None else calls  # line ends in strings

    def _calls_of(self, text: str) -> list[Call] | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as of an escape that Python does not know
                if self.lines:
                    nodes = [node.value for node in ast.parse(text).body if isinstance(node, ast.Expr)]
                else:
                    tree = ast.parse(text, mode="eval").body
                    nodes = tree.elts if isinstance(tree, ast.List) else []
            calls = [_python_call(one) for one in nodes]
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return None
        return None if None in calls else [call for call in calls if call is not None]

    def required(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        before = lark.literal(self.marks[0]) if self.marked else ""
        return f"{before} {self._calls(lark, tools, many)}"

    def optional(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        if self.marked:
            return f"({lark.until(self.marks[0])} {self._calls(lark, tools, many)} ANY | ANY)"
        other = lark.rule('/[^\\[\\s](?s:.*)/ | ""')
        return f"({self.required(lark, tools, many)} | {other})"

    def _calls(self, lark: Lark, tools: Sequence[Tool], many: bool) -> str:
        one = lark.rule(" | ".join(_written(tool, lark) for tool in tools))
        first, between, last = ("", "\n", "") if self.lines else ("[", ", ", "]")
        more = f"({json.dumps(between)} {one})*" if many else ""
        end = lark.literal(last + (self.marks[1] if self.marked else ""))
        return f"{json.dumps(first)} {one} {more} {end}"


def _python_call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        return None
    return call_of(ast.unparse(node.func), {str(word.arg): _literal(word.value) for word in node.keywords})


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal, in which JSON's words for constants count, too; ValueError if it is none."""
    if isinstance(node, ast.Name) and node.id in LITERALS:
        return LITERALS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) for key in node.keys if key is not None]
        return dict(zip(map(str, keys), map(_literal, node.values), strict=True))
    value = ast.literal_eval(node)
    if isinstance(value, str | int | float | None):
        return value
    raise ValueError("JSON has no such value")


def _written(tool: Tool, lark: Lark) -> str:
    """Return the expression of a call, with its arguments in the schema's order."""
    shared = definitions(tool.parameters)

    def argument(key: str, schema: Any) -> str:
        schema = {**shared, **schema} if isinstance(schema, dict) else schema
        return f"{json.dumps(f'{key}=')} {lark.schema(schema, tool.strict)}"

    parts = [(argument(key, schema), key in tool.required) for key, schema in tool.properties.items()]
    return f'{json.dumps(f"{tool.name}(")} {lark.in_order(parts, ", ")} ")"'
