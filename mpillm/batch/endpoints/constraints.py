"""The keys of a body that hold its answer to a grammar, as a grammar of llguidance."""

from __future__ import annotations

from typing import Any

from mpillm.errors import RequestError
from mpillm.spec import ResponseFormat, Spec, StructuredOutputs
from mpillm.text import constrain

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def grammar_of(body: Any, spec: Spec) -> str | None:
    """The grammar that a body asks for, or the job if the body asks for none; None if neither does.

    RequestError if they ask for several, or if what they ask for is malformed.
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
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} exclude one another")
    for key, value in asked.items():
        try:
            return _grammar(key, value)
        except RequestError as error:
            raise RequestError(f"{key}: {error}") from None
    return None


def _grammar(key: str, value: Any) -> str | None:
    if key == "response_format":
        return _response_format(value)
    if key in GUIDED:
        value = StructuredOutputs(**{GUIDED[key]: value})
    return _structured(value)


def _response_format(asked: ResponseFormat) -> str | None:
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return constrain.json_grammar({"type": "object"})
    if asked.json_schema is None:
        raise RequestError("the key 'json_schema' is missing")
    return constrain.json_grammar(asked.json_schema.schema, lenient=asked.json_schema.strict is False)


def _structured(asked: StructuredOutputs) -> str:
    kinds = {key: getattr(asked, key) for key in ("json", "regex", "choice", "grammar", "json_object")}
    kind, value = constrain.one_of(kinds, "it")
    if kind in ("json", "json_object"):
        schema = {"type": "object"} if kind == "json_object" else value
        return constrain.json_grammar(schema, whitespace=not asked.disable_any_whitespace)
    if kind == "choice":
        return constrain.choice_grammar(value)
    return constrain.regex_grammar(value) if kind == "regex" else constrain.text_grammar(value)
