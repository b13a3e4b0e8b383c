"""Grammars of llguidance that are put together from literals, JSON schemas and other grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpillm.text.constrain import json_grammar


class Lark:
    """A grammar in the making; what its methods return are expressions.

    `control` are the control tokens with their ids: in a grammar they are not characters.
    """

    def __init__(self, control: Mapping[str, int]) -> None:
        self._control = control
        names = sorted(filter(None, control), key=len, reverse=True)
        self._tokens = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._rules: list[str] = ["ANY: /(?s:.*)/"]
        self._grammars: list[dict[str, Any]] = []
        self._names = 0

    def literal(self, text: str) -> str:
        """Just this text, in which control tokens are tokens."""
        pieces = self._pieces(text)
        if not pieces:
            return '""'
        return " ".join(f"<[{self._control[piece]}]>" if own else json.dumps(piece) for piece, own in pieces)

    def until(self, end: str, patterns: Sequence[str] = ()) -> str:
        """Any text up to `end`, and that; the text matches each of the patterns as a whole."""
        pieces = self._pieces(end)
        at = next((at for at, (_, own) in enumerate(pieces) if own), None)
        text = self.terminal(" & ".join(map(_regex, patterns))) if patterns else "ANY"
        if at is not None and (not patterns or at == 0):  # characters before it are part of any text
            return f"{text} " + self.literal("".join(piece for piece, _ in pieces[at:]))
        name = f"until_{len(self._rules)}"
        first = pieces[0][0]
        self._rules.append(f"{name}[lazy]: {text} {json.dumps(first)}")
        return " ".join([name, self.literal(end[len(first) :])]) if len(pieces) > 1 else name

    def schema(self, schema: Any, strict: bool) -> str:
        """JSON that a schema accepts; RequestError if it is malformed."""
        return self.embedded(json_grammar(schema, lenient=not strict))

    def embedded(self, grammar: str) -> str:
        """Return the texts that another grammar accepts."""
        name = f"part_{len(self._grammars)}"
        inner = json.loads(grammar)["grammars"][0] if grammar.startswith("{") else {"lark_grammar": grammar}
        self._grammars.append({**inner, "name": name})
        return f"@{name}"

    def rule(self, expression: str) -> str:
        """Return an expression by a name."""
        name = self.reserve()
        self.define(name, expression)
        return name

    def reserve(self) -> str:
        """Return the name of a rule that is defined later, which may lead to itself."""
        self._names += 1
        return f"rule_{self._names}"

    def define(self, name: str, expression: str) -> None:
        """Give a reserved name its expression."""
        self._rules.append(f"{name}: {expression}")

    def terminal(self, expression: str) -> str:
        """Return an expression of regular expressions by a name; `&` and `~` may join them."""
        name = f"TEXT_{len(self._rules)}"
        self._rules.append(f"{name}: {expression}")
        return name

    def in_order(self, parts: Sequence[tuple[str, bool]], between: str) -> str:
        """Parts in their order with a text between two of them; those that are not required may be left out."""
        separator, tail = json.dumps(between), ""
        ways: list[str] = []
        for part, required in reversed(parts):
            one = self.rule(part)
            if required:
                ways.clear()
            ways.append(f"{one} {tail}")
            tail = self.rule(f"({separator} {one}){'' if required else '?'} {tail}")
        if not any(required for _, required in parts):
            ways.append('""')
        return self.rule(" | ".join(ways))

    def whole(self, start: str) -> str:
        """Return the grammar of an expression."""
        lark = "\n".join([f"start: {start}", *self._rules])
        return json.dumps({"grammars": [{"lark_grammar": lark}, *self._grammars]})

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        """Return a text at its control tokens, and whether each piece is one."""
        split = self._tokens.split(text) if self._tokens else [text]
        return [(piece, index % 2 == 1) for index, piece in enumerate(split) if piece]


def _regex(pattern: str) -> str:
    """Return a regular expression between slashes."""
    written = re.sub(r"\\.|[/\n]", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), pattern)
    return f"/{written}/"
