"""Answers that obey a grammar: which tokens may follow, by the llguidance library.

A grammar is a string in llguidance's own form, as `json_grammar` and its neighbours make it. The state of a matcher
follows from the tokens it was given alone, so an answer that is resumed has the same tokens as one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from mpillm.errors import RequestError
from mpillm.text.interruptible import interruptible
from mpillm.text.schema_checks import check_maximum, check_pattern, check_repeated, check_schema, repeated

# Between the tokens of JSON: a space, or a line's end with an indentation. Without a bound models run away in it.
WHITESPACE = r" |\n[ \t]{0,32}"
MAX_WORDS = 300  # characters of a message of the library
# The library takes time for the square of alternatives, memory for the square of a regular expression, and stack for
# each rule or reference that leads to another one (3 and 9 KiB); where that ends, the process does. With these bounds
# and those of `schema_checks`, compiling takes a second at most, what `planning.grammar_memory` says, and of STACK
# what it needs.
MAX_LENGTH = 1 << 20  # characters of a grammar as the library gets it
MAX_CHOICES = 20_000  # texts to choose from
MAX_GRAMMAR = 1 << 16  # characters of a grammar in Lark's notation or GBNF
STACK = 96 << 20
CACHED = 16  # compiled grammars that are kept for other requests
# Keywords of a schema: those that name properties, whose values are schemas by names, and whose values are no schemas.
NAMING = frozenset({"properties", "patternProperties"})
OF_SCHEMAS = NAMING | {"$defs", "definitions", "dependentSchemas"}
OF_VALUES = frozenset({"const", "default", "enum", "examples"})


def read_schema(schema: Any) -> Any:
    """Return a schema, which may be a string of JSON."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the schema is not JSON: {error}") from None


def closed(schema: Any) -> Any:
    """Return a schema whose objects have none but the properties that it names."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if key in OF_SCHEMAS and isinstance(value, dict):
            found[key] = {name: closed(one) for name, one in value.items()}
        else:
            found[key] = value if key in OF_VALUES else closed(value)
    return found if found.keys().isdisjoint(NAMING) else {**found, "additionalProperties": False}


def json_grammar(
    schema: Any, *, lenient: bool = False, whitespace: bool = True, pattern: str | None = None
) -> str:
    """JSON that a schema accepts; where `lenient`, keywords that cannot be enforced are passed over.

    `pattern` is the regular expression of what may stand between the tokens of JSON.
    """
    schema = read_schema(schema)
    if schema is False:
        raise RequestError("nothing obeys the schema false")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise RequestError("a schema must be an object, true or false")
    check_schema(schema)
    options: Any = {"lenient": lenient, "whitespace_flexible": whitespace}
    if whitespace:
        check_pattern(pattern or "")
        options["whitespace_pattern"] = WHITESPACE if pattern is None else pattern
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    except (ValueError, RecursionError) as error:  # a number beyond 64 bits, too many levels
        raise RequestError(f"the schema cannot be read: {_short(str(error))}") from None


def regex_grammar(pattern: str) -> str:
    """Return the texts that a regular expression of Rust's regex crate matches as a whole; RequestError if too long."""
    check_pattern(pattern)
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: Sequence[str]) -> str:
    """Return one of these texts; RequestError if there are more than MAX_CHOICES."""
    check_maximum("texts to choose from", len(choices), MAX_CHOICES)
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))


def text_grammar(text: str) -> str:
    """Return a grammar as users write it: Lark's notation, or GBNF (with ::=); RequestError if it is too long."""
    check_maximum("characters of the grammar", len(text), MAX_GRAMMAR)
    check_repeated("the grammar", repeated(text))
    if "::=" in text:
        try:
            text = gbnf_to_lark(text)
        except Exception as error:  # the converter raises whatever its parser runs into
            raise RequestError(f"the grammar cannot be read: {_short(str(error))}") from None
    return LLMatcher.grammar_from_lark(text)


class Grammars:
    """Grammars over the tokens of a model with `vocab` tokens, whose `end_ids` end a text."""

    def __init__(self, tokenizer: str, vocab: int, end_ids: frozenset[int]) -> None:
        """`tokenizer` is the JSON of the tokenizers library; RequestError if llguidance cannot read it."""
        try:
            self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab, eos_token=sorted(end_ids) or None)
        except Exception as error:  # whatever the library makes of it
            raise RequestError(f"llguidance cannot use the model's tokenizer: {_short(str(error))}") from None
        self._words, self._end_ids = -(-vocab // 32), end_ids
        self._compiled = lru_cache(maxsize=CACHED)(self._compile)

    def matcher(self, grammar: str) -> Matcher:
        """Return a matcher at the beginning of a text; RequestError if the grammar is wrong, or nothing can obey it."""
        return Matcher(self._compiled(grammar).deep_copy(), self._words, self._end_ids)

    def check(self, grammar: str) -> None:
        """RequestError as `matcher` raises it."""
        self._compiled(grammar)

    def _compile(self, grammar: str) -> LLMatcher:
        check_maximum("characters of the grammar", len(grammar), MAX_LENGTH)
        matcher = interruptible(lambda: LLMatcher(self._tokenizer, grammar, log_level=0), STACK)
        if matcher.is_error():
            raise RequestError(f"it cannot be enforced: {_short(matcher.get_error())}")
        if Matcher(matcher, self._words, self._end_ids).stuck:
            raise RequestError("it cannot be enforced: nothing obeys it")
        return matcher


class Matcher:
    """The position of a text in a grammar; a `Constraint` of the engine."""

    def __init__(self, matcher: LLMatcher, words: int, end_ids: frozenset[int]) -> None:
        self._matcher, self._words, self._end_ids = matcher, words, end_ids
        self._forced: list[int] = matcher.compute_ff_tokens()

    def copy(self) -> Matcher:
        """Another one that has come as far."""
        return Matcher(self._matcher.deep_copy(), self._words, self._end_ids)

    @property
    def forced(self) -> list[int]:
        """The tokens that must follow: those that the tokenizer makes of the text that must."""
        return self._forced

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text obeys the grammar as it is; at the end false only where the library gave up."""
        return not self._matcher.is_error()

    @property
    def stuck(self) -> bool:
        """Whether the text does not obey the grammar as it is, and no token could follow."""
        if self._matcher.is_accepting() or self._forced:
            return False
        mask = self.allowed().view(np.uint32)
        for id in self._end_ids:  # the library allows end tokens where nothing else may follow
            mask[id // 32] &= ~np.uint32(1 << id % 32)
        return not mask.any()

    def push(self, token: int) -> None:
        """Take note of the next token, which was allowed."""
        self._matcher.consume_token(token)
        self._forced = self._forced[1:]
        if not self._forced and not self.ended:
            self._forced = self._matcher.compute_ff_tokens()

    def accepts(self, token: int) -> bool:
        """Return whether it may follow."""
        return token == self._forced[0] if self._forced else self._matcher.validate_tokens([token]) == 1

    def allowed(self) -> NDArray[np.int32]:
        """Return a bit for each token that may follow: int32 [ceil(vocabulary / 32)]."""
        mask = np.zeros(self._words, np.int32)
        if self._forced:
            word, bit = divmod(self._forced[0], 32)
            mask.view(np.uint32)[word] = 1 << bit
        else:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask


def _short(message: str) -> str:
    """Return the library's words as part of a sentence."""
    text = " ".join(message.split())
    return text if len(text) <= MAX_WORDS else f"{text[:MAX_WORDS]}..."


def one_of(given: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """Return the only key of `given` that is not null, with its value; RequestError if there are none or several."""
    found = [(key, value) for key, value in given.items() if value is not None]
    if len(found) != 1:
        raise RequestError(f"{where} must have one of {', '.join(given)}")
    return found[0]
