"""Chat templates: messages to text, in which the user's control tokens are told from the template's own.

The text of a chat is the template's control tokens around strings that users wrote. Encoding it as a whole would let
a user write control tokens, too. A template is therefore rendered twice: once as it is (T), and once (M) with marks
in the user's strings (see `marks`). Every control token found in M is the template's own:

- T and M hold the same control tokens: users wrote none, and T is encoded as it is, exactly as transformers does.
- M without its marks is T, but T holds more control tokens: these are the user's and are encoded as ordinary text.
- M without its marks is another text, and the control tokens differ, too: the template looked at the very
  characters (it measured or cut the string), and the request is refused.

The time and memory that a template may take are bounded by where it runs (see `confined`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
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
from mpillm.text.arguments import Arguments
from mpillm.text.bounds import MAX_CHARS, TooLongError
from mpillm.text.content import REFUSES, Contents, Message, Pieces
from mpillm.text.marks import Marker, unused_mark

OPEN_END = "\U0001fffe "  # stands at the end of a message that is to be continued: a noncharacter, and what trims take
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which reasoning is passed


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
    """JSON without jinja's escapes for HTML, as in transformers."""
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

    def render(
        self, messages: list[Message], options: Mapping[str, Any] | None = None, max_chars: int = MAX_CHARS
    ) -> str:
        """Return the chat as one text, with `options` (chat_template_kwargs) as variables.

        The content of a message is a string, a list of parts ({"type": "text", "text": ...}) or None; a string or a
        list is brought into the form that the template reads. RequestError if the template fails, TooLongError
        if the text is longer than `max_chars`.
        """
        return self._render(self._fit(messages), options or {}, max_chars)

    def pieces(
        self, messages: list[Message], options: Mapping[str, Any] | None = None, max_chars: int = MAX_CHARS
    ) -> str | Pieces:
        """Return the chat as one text if all control tokens are the template's, else in pieces that say which are."""
        messages, options = self._fit(messages), options or {}
        text = self._render(messages, options, max_chars)
        tokens = self._marker.tokens
        if tokens is None:
            return text
        mark = unused_mark([text])
        if mark is None:
            raise RequestError("The messages use every noncharacter of Unicode; remove one.")
        marked = self._render(
            self._marker.marked(messages, mark), self._marker.marked(options, mark), 4 * max_chars
        )
        own = tokens.findall(marked)
        if tokens.findall(text) == own:
            return text
        if marked.replace(mark, "") != text:
            raise RequestError(
                "The messages hold control tokens of this model (such as <|im_end|>) where its chat template looks for "
                "them; remove them."
            )
        split = tokens.split(marked)  # text, token, text, token, ..., text
        return [(piece.replace(mark, ""), index % 2 == 1) for index, piece in enumerate(split)]

    def _fit(self, messages: list[Message]) -> list[Message]:
        """Return the messages in the forms that the template reads."""
        return self._arguments.fit(self._contents.fit(_aliased(messages)))

    def _render(self, messages: Any, options: Any, max_chars: int) -> str:
        """Return the chat as one text.

        With `continue_final_message` among the options it ends where the content of the last message does, as in
        transformers.
        """
        if not messages:
            raise RequestError("The chat has no messages.")
        if not options.get("continue_final_message"):
            return self._generate(messages, options, max_chars)
        text = self._generate([*messages[:-1], _open(messages[-1])], options, max_chars + len(OPEN_END))
        before, found, after = text.rpartition(OPEN_END[0])
        if not found:
            raise RequestError(f"{REFUSES}: it does not show the last one, which the answer is to continue.")
        return before if after.startswith(OPEN_END[1]) else before.rstrip()  # the template trims contents

    def _generate(self, messages: Any, options: Any, max_chars: int) -> str:
        variables = {"add_generation_prompt": True, "tools": None, "documents": None} | dict(self.variables)
        length, pieces = 0, []
        try:
            for piece in self._compiled.generate(variables | {**options, "messages": messages}):
                length += len(piece)
                if length > max_chars:
                    raise TooLongError(f"more than {max_chars} characters")
                pieces.append(piece)
        except (MemoryError, TooLongError):
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
            raise RequestError(f"The model's chat template is not valid: {error}") from error

    @cached_property
    def _contents(self) -> Contents:
        return Contents(lambda messages: self._render(messages, {}, MAX_CHARS))

    @cached_property
    def _arguments(self) -> Arguments:
        return Arguments(lambda messages: self._render(messages, {}, MAX_CHARS))

    @cached_property
    def _marker(self) -> Marker:
        parsed = self._environment.parse(self.source)
        compared = {text for node in parsed.find_all(jinja2.nodes.Compare) for text in _strings(node)}
        return Marker(self.control, _strings(parsed), compared)


def _open(message: Message) -> Message:
    """Return a message with OPEN_END behind its content."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + OPEN_END}
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        return {
            **message,
            "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + OPEN_END}],
        }
    raise RequestError("The last message has no text that could be continued.")


def _strings(node: jinja2.nodes.Node) -> Iterator[str]:
    """Yield the string literals below a node of a template."""
    for constant in node.find_all(jinja2.nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


def _aliased(messages: list[Message]) -> list[Message]:
    """Reasoning under both names that templates read, as transformers fills them."""
    found = []
    for message in messages:
        reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        found.append(message)
    return found
