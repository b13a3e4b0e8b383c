"""The keys of a body that hold its answer to a grammar, as a grammar of llguidance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mpillm.batch.work import Model
from mpillm.errors import RequestError
from mpillm.spec import ResponseFormat, Spec, StructuralTags, StructuredOutputs, plain_words
from mpillm.text import constrain
from mpillm.text.structural_tags import Format, JsonFormat, Tag, TriggeredTags, tags_grammar

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True)
class Held:
    """The grammar that an answer is held to."""

    grammar: str
    asked: str | None = None  # the part of it that a key of the body or the job asks for
    key: str = ""

    def check(self, grammars: constrain.Grammars) -> None:
        """Raise RequestError if it cannot be enforced, which names the key if that is why."""
        try:
            grammars.check(self.grammar)
        except RequestError as error:
            if self.asked is not None and self.asked != self.grammar:
                replace(self, grammar=self.asked).check(grammars)
            elif self.asked is not None:
                raise RequestError(f"{self.key}: {error}") from None
            raise


def grammar_of(body: Any, spec: Spec, model: Model) -> Held | None:
    """Return the grammar that a body asks for, or the job if the body asks for none; None if neither does.

    RequestError if they ask for several, or if what they ask for is malformed. `Held.check` tells whether it can be
    enforced.
    """
    own = {key: getattr(body, key) for key in ("response_format", "structured_outputs", *GUIDED)}
    asked = {key: value for key, value in own.items() if value is not None}
    if not asked:
        job = spec.sampling
        asked = {
            key: value
            for key in ("response_format", "structured_outputs")
            if (value := getattr(job, key)) is not None
        }
    if len(asked) > 1 and getattr(asked.get("response_format"), "type", None) == "text":
        del asked["response_format"]  # it asks for nothing
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} cannot be used together")
    for key, value in asked.items():
        try:
            grammar = _grammar(key, value, model)
            return None if grammar is None else Held(grammar, grammar, key)
        except RequestError as error:
            raise RequestError(f"{key}: {error}") from None
    return None


def _grammar(key: str, value: Any, model: Model) -> str | None:
    if key == "response_format":
        return _response_format(value, model)
    if key in GUIDED:
        value = StructuredOutputs(**{GUIDED[key]: value})
    return _structured(value, model)


def _response_format(asked: ResponseFormat, model: Model) -> str | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return constrain.json_grammar({"type": "object"})
    if asked.type == "structural_tag":
        tags = StructuralTags(format=asked.format, structures=asked.structures, triggers=asked.triggers)
        return _tags(tags, model)
    if asked.json_schema is None:
        raise RequestError("the key 'json_schema' is missing")
    return constrain.json_grammar(asked.json_schema.schema, lenient=asked.json_schema.strict is False)


def _structured(asked: StructuredOutputs, model: Model) -> str:
    kinds = {key: getattr(asked, key) for key in KINDS} | {"json_object": asked.json_object or None}
    kind, value = constrain.one_of(kinds, "it")
    options: dict[str, Any] = {
        "whitespace": not asked.disable_any_whitespace,
        "pattern": asked.whitespace_pattern,
    }
    if kind in ("json", "json_object"):
        schema = {"type": "object"} if kind == "json_object" else constrain.read_schema(value)
        if asked.disable_additional_properties:
            schema = constrain.closed(schema)
        return constrain.json_grammar(schema, **options)
    if kind == "structural_tag":
        return _tags(_read_tags(value), model, **options)
    if kind == "choice":
        return constrain.choice_grammar(value)
    return constrain.regex_grammar(value) if kind == "regex" else constrain.text_grammar(value)


def _tags(asked: StructuralTags, model: Model, **options: Any) -> str:
    control = {} if model.text is None else model.text.control
    return tags_grammar(_format(asked), control, **options)


def _format(asked: StructuralTags) -> Format:
    """Return the format of structural tags, of which `structures` and `triggers` are an older form."""
    if asked.format is None:
        if not asked.structures or not asked.triggers:
            raise RequestError("structural tags need a format, or structures and triggers")
        tags = [
            Tag(begin=one.begin, content=JsonFormat(json_schema=one.schema), end=one.end)
            for one in asked.structures
        ]
        return TriggeredTags(triggers=asked.triggers, tags=tags)
    if asked.structures or asked.triggers:
        raise RequestError("give either format, or structures and triggers")
    try:
        found: Format = msgspec.convert(asked.format, Format)
        return found
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        raise RequestError(f"format{place.rstrip('`')}: {plain_words(text)}") from None
    except RecursionError:
        raise RequestError("format has too many levels") from None


def _read_tags(given: StructuralTags | str) -> StructuralTags:
    if not isinstance(given, str):
        return given
    try:
        return msgspec.json.decode(given, type=StructuralTags)
    except msgspec.ValidationError as error:
        raise RequestError(f"structural_tag: {plain_words(str(error))}") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        said = str(error).removeprefix("JSON is malformed: ")
        raise RequestError(f"structural_tag is not JSON: {said}") from None
