"""Structural tags: a text of parts that are free, JSON, or other grammars, between tags.

They are those of xgrammar, as vLLM takes them, without its formats of tokens and its bounds of lengths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

from mpillm.errors import RequestError
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.constrain import MAX_CHOICES, json_grammar, regex_grammar, text_grammar

MAX_DEPTH = 32  # levels of formats within formats
Word = Annotated[str, Meta(min_length=1)]
Nothing = Annotated[list[str], Meta(max_length=0)]


class Kind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """A format, by its `type`."""


class ConstString(Kind, frozen=True, tag="const_string"):
    """Just this text."""

    value: str


class JsonFormat(Kind, frozen=True, tag="json_schema"):
    """JSON that a schema accepts."""

    json_schema: dict[str, Any] | bool
    style: Literal["json"] = "json"
    any_order: Literal[False] = False


class Regex(Kind, frozen=True, tag="regex"):
    """The texts that a regular expression matches."""

    pattern: str


class Grammar(Kind, frozen=True, tag="grammar"):
    """The texts that a grammar accepts."""

    grammar: str


class AnyText(Kind, frozen=True, tag="any_text"):
    """Any text, at the end of all or as all that stands in a tag."""

    excludes: Nothing = []
    max_tokens: None = None
    max_chars: None = None


class InOrder(Kind, frozen=True, tag="sequence"):
    """One behind the other."""

    elements: Annotated[list[Format], Meta(min_length=1)]


class AnyOf(Kind, frozen=True, tag="or"):
    """One of them."""

    elements: Annotated[list[Format], Meta(min_length=1)]


class Maybe(Kind, frozen=True, tag="optional"):
    """`content`, or nothing."""

    content: Format


class Plus(Kind, frozen=True, tag="plus"):
    """`content`, once or more."""

    content: Format


class Star(Kind, frozen=True, tag="star"):
    """`content`, any number of times."""

    content: Format


class Repeat(Kind, frozen=True, tag="repeat"):
    """Repeat `content` between `min` and `max` times; -1: without a bound."""

    min: Annotated[int, Meta(ge=0, le=MAX_CHOICES)]
    max: Annotated[int, Meta(ge=-1, le=MAX_CHOICES)]
    content: Format


class Tag(Kind, frozen=True, tag="tag"):
    """`begin`, the content, and one of the ends."""

    begin: str
    content: Format
    end: str | Annotated[list[str], Meta(min_length=1)]


class TriggeredTags(Kind, frozen=True, tag="triggered_tags"):
    """Any text, in which one of the tags that begin with a trigger follows where it comes."""

    triggers: Annotated[list[Word], Meta(min_length=1)]
    tags: Annotated[list[Tag], Meta(min_length=1, max_length=MAX_CHOICES)]
    at_least_one: bool = False
    stop_after_first: bool = False
    excludes: Nothing = []


class TagsWithSeparator(Kind, frozen=True, tag="tags_with_separator"):
    """Tags with a text between them."""

    tags: Annotated[list[Tag], Meta(min_length=1, max_length=MAX_CHOICES)]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


Format = Union[  # noqa: UP007 - names that are defined later
    ConstString, JsonFormat, Regex, Grammar, AnyText, InOrder, AnyOf, Maybe, Plus, Star, Repeat, Tag, TriggeredTags,
    TagsWithSeparator,
]  # fmt: skip


def tags_grammar(format: Format, control: Mapping[str, int], **options: Any) -> str:
    """Return the grammar of a format, where `control` are the control tokens with their ids.

    The `options` are those of `json_grammar`. RequestError if a part of the format is wrong.
    """
    formats = _Formats(Lark(control), options)
    return formats.lark.whole(formats.expression(format, last=True))


class _Formats:
    """Makes expressions of formats."""

    def __init__(self, lark: Lark, options: Mapping[str, Any]) -> None:
        self.lark, self._options = lark, options

    def expression(self, format: Format, last: bool, depth: int = 0) -> str:
        """Return the expression of a format, which is `last` if nothing follows it."""
        if depth > MAX_DEPTH:
            raise RequestError(f"there are formats in more than {MAX_DEPTH} others")
        lark, below = self.lark, depth + 1
        if not last and (
            isinstance(format, AnyText)
            or (isinstance(format, TriggeredTags) and not (format.at_least_one and format.stop_after_first))
        ):
            raise RequestError(
                f"{type(format).__struct_config__.tag} must come last, or be the only content of a tag"
            )
        match format:
            case ConstString():
                return lark.literal(format.value)
            case JsonFormat():
                return self._json(format.json_schema)
            case Regex():
                return lark.embedded(regex_grammar(format.pattern))
            case Grammar():
                return lark.embedded(text_grammar(format.grammar))
            case AnyText():
                return "ANY"
            case InOrder(elements=[*first, end]):
                return " ".join(
                    [
                        *(self.expression(one, False, below) for one in first),
                        self.expression(end, last, below),
                    ]
                )
            case AnyOf():
                return self._one_of([self.expression(one, last, below) for one in format.elements])
            case Maybe() | Plus() | Star():
                sign = {Maybe: "?", Plus: "+", Star: "*"}[type(format)]
                return f"({self.expression(format.content, False, below)}){sign}"
            case Repeat():
                times = "" if format.max < 0 else format.max
                if format.max >= 0 and format.max < format.min:
                    raise RequestError(f"repeat has a min of {format.min} and a max of {format.max}")
                return f"({self.expression(format.content, False, below)}){{{format.min},{times}}}"
            case Tag():
                return self.tag(format, depth)
            case TriggeredTags():
                return self._triggered(format, depth)
            case TagsWithSeparator():
                one = self._one_of([self.tag(tag, below) for tag in format.tags])
                more = "" if format.stop_after_first else f"({lark.literal(format.separator)} {one})*"
                return f"{one} {more}" if format.at_least_one else f"({one} {more})?"
        raise AssertionError(format)

    def tag(self, tag: Tag, depth: int, trigger: str = "") -> str:
        """Return the expression of a tag behind its beginning with the trigger."""
        ends = [tag.end] if isinstance(tag.end, str) else tag.end
        begin = self.lark.literal(tag.begin[len(trigger) :])
        if isinstance(tag.content, AnyText):
            return f"{begin} {self._one_of([self.lark.until(end) if end else 'ANY' for end in ends])}"
        content = self.expression(tag.content, False, depth + 1)
        return f"{begin} {content} {self._one_of([self.lark.literal(end) for end in ends])}"

    def _triggered(self, format: TriggeredTags, depth: int) -> str:
        of_trigger: dict[str, list[str]] = {trigger: [] for trigger in format.triggers}
        for index, tag in enumerate(format.tags):
            trigger = max(filter(tag.begin.startswith, of_trigger), key=len, default=None)
            if trigger is None:
                raise RequestError(f"tag {index + 1} begins with none of the triggers")
            of_trigger[trigger].append(self.tag(tag, depth, trigger))
        unused = next((trigger for trigger, parts in of_trigger.items() if not parts), None)
        if unused is not None:
            raise RequestError(f"no tag begins with the trigger {unused[:60]!r}")
        units = self._one_of(
            [f"{self.lark.until(trigger)} {self._one_of(parts)}" for trigger, parts in of_trigger.items()]
        )
        if not format.at_least_one:
            return f"({units} | ANY)" if format.stop_after_first else f"({units})* ANY"
        first = self._one_of([self.tag(tag, depth) for tag in format.tags])
        return first if format.stop_after_first else f"{first} ({units})* ANY"

    def _json(self, schema: Any) -> str:
        (grammar,) = json.loads(json_grammar(schema, **self._options))["grammars"]
        return f"%json {json.dumps(grammar['json_schema'])}"

    def _one_of(self, parts: Sequence[str]) -> str:
        return f"({' | '.join(self.lark.rule(part) for part in parts)})"
