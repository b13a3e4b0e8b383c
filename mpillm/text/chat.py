"""Chat templates: messages to text, with the user's strings told from the template's own.

A chat's text is the template's control tokens around strings that users wrote, and encoding it as a whole
would let a user write control tokens, too. So a template is rendered twice: once as it is (T), and once (M) with
a private mark beside each character of the user's strings with which a control token begins or ends. Every
control token found in M is therefore the template's own:

- T and M hold the same control tokens: users wrote none, and T is encoded as it is, exactly as transformers does.
- M without its marks is T, but T holds more: the others are the user's and are encoded as ordinary text.
- M without its marks is something else, and the control tokens differ, too: the template looked at the very
  characters (it measured or cut the string), and the request is refused.

What a template may take of time and memory is bounded by where it runs (see `confined`).

Strings that the template itself asks for ("</think>" in content) are not broken up: they are read from its
source, and get marks around them only where they could be part of a control token. So tests of content, trims
and repeated use give M and T the same text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from mpillm.errors import RequestError

MAX_TEXT = 1 << 24  # characters of a rendered chat
REFUSES = "The model's chat template refuses these messages"
MARKS = "".join(chr(0xFDD0 + n) for n in range(32))  # noncharacters; a text that has one does not have all
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which reasoning is passed

Special = list[
    tuple[str, bool]
]  # pieces of a rendered chat: (text, is a control token of the template's own)


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class says so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without jinja's escapes for HTML, as transformers has it."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, and the control tokens that only it may write.

    `variables` are what it sees besides messages (bos_token, ...). `now` is the date it is told, if it asks: a run
    that goes on tomorrow gives the date of its beginning.
    """

    source: str
    control: Collection[str]
    variables: Mapping[str, str]
    now: Callable[[], datetime] = datetime.now

    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any] | None = None) -> str:
        """The chat as one text, with `options` (chat_template_kwargs) as variables; RequestError if it fails."""
        return self._render(_aliased(messages), options or {})

    def pieces(
        self, messages: list[dict[str, Any]], options: Mapping[str, Any] | None = None
    ) -> str | Special:
        """The chat as one text if all its control tokens are the template's own, else in pieces that say which are."""
        messages, options = _aliased(messages), options or {}
        for message in messages:
            if message.get("role") not in ROLES:
                raise RequestError(
                    f"The role {message.get('role')!r} is not one of {', '.join(sorted(ROLES))}."
                )
        text = self._render(messages, options)
        if self._tokens is None:
            return text
        free = [char for char in MARKS if char not in text]
        if not free:
            raise RequestError("The messages use every noncharacter of Unicode; remove one.")
        mark = free[0]
        marked = self._render(self._marked(messages, mark), self._marked(options, mark))
        own = self._tokens.findall(marked)
        if self._tokens.findall(text) == own:
            return text
        if marked.replace(mark, "") != text:
            raise RequestError(
                "The messages hold control tokens of this model (such as <|im_end|>) where its chat template looks for "
                "them; remove them."
            )
        split = self._tokens.split(marked)  # text, token, text, token, ..., text
        return [(piece.replace(mark, ""), index % 2 == 1) for index, piece in enumerate(split)]

    def _render(self, messages: Any, options: Any) -> str:
        if not messages:
            raise RequestError("The chat has no messages.")
        variables = {"add_generation_prompt": True, "tools": None, "documents": None} | dict(self.variables)
        length, pieces = 0, []
        try:
            for piece in self._compiled.generate(variables | {**options, "messages": messages}):
                length += len(piece)
                if length > MAX_TEXT:
                    raise jinja2.TemplateError(f"it gives more than {MAX_TEXT} characters")
                pieces.append(piece)
        except MemoryError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise RequestError(f"{REFUSES}: {str(error)[:1000] or type(error).__name__}") from error
        return "".join(pieces)

    @cached_property
    def _environment(self) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: self.now().strftime(format)
        return environment

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return self._environment.from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise RequestError(f"The model's chat template is no template: {error}") from error

    @cached_property
    def _tokens(self) -> re.Pattern[str] | None:
        """Finds control tokens, the longest of those that begin at a place; None if the model has none."""
        tokens = sorted((token for token in self.control if token), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, tokens)) + ")") if tokens else None

    @cached_property
    def _borders(self) -> tuple[re.Pattern[str], frozenset[str], frozenset[str]]:
        """What gets marks: literals of the template, and (as sets) first and last characters of control tokens."""
        first = frozenset(token[0] for token in self.control if token)
        last = frozenset(token[-1] for token in self.control if token)
        edge = first | last
        literals = {
            node.value
            for node in self._environment.parse(self.source).find_all(jinja2.nodes.Const)
            if isinstance(node.value, str) and edge & set(node.value) and len(node.value) > 1
        }
        whole = self._tokens
        kept = sorted(
            (text for text in literals if not (whole and whole.search(text))), key=len, reverse=True
        )
        edges = "[" + "".join(map(re.escape, sorted(edge))) + "]"
        return re.compile("|".join([*map(re.escape, kept), edges])), first, last

    def _marked(self, value: Any, mark: str, key: str = "") -> Any:
        """`value` with marks in all its strings, but for roles: those that are known are no words of the user's."""
        if isinstance(value, str):
            return value if key == "role" and value in ROLES else self._marked_text(value, mark)
        if isinstance(value, dict):
            return {
                self._marked_text(name, mark, inner=False): self._marked(item, mark, name)
                for name, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._marked(item, mark) for item in value]
        return value

    def _marked_text(self, text: str, mark: str, inner: bool = True) -> str:
        pattern, first, last = self._borders

        def put(match: re.Match[str]) -> str:
            found = match.group()
            if len(found) == 1:
                return (mark if found in last else "") + found + (mark if found in first else "")
            before = any(self._ends(found[:length]) for length in range(1, len(found) + 1))
            after = any(self._begins(found[-length:]) for length in range(1, len(found) + 1))
            return (mark if before else "") + found + (mark if after else "")

        marked = pattern.sub(put, text)
        core = text.strip()
        if inner and marked == text and core and any(core in token for token in self.control):
            at = text.index(core) + 1  # "user" alone: the template may write <| and |> around it
            marked = text[:at] + mark + text[at:]
        return marked

    def _begins(self, text: str) -> bool:
        return any(token.startswith(text) for token in self.control)

    def _ends(self, text: str) -> bool:
        return any(token.endswith(text) for token in self.control)


def _aliased(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reasoning under both names that templates read, as transformers fills them."""
    found = []
    for message in messages:
        reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        found.append(message)
    return found
