"""Values that the keys of a body take, by their names: every field of every endpoint has some (`test_fuzz` looks)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.bodies import Draw

Values = tuple[Any, ...]

SCHEMAS: Values = (
    True,
    {},
    {"type": "object"},
    {"type": "string", "maxLength": 5},
    {"enum": ["fox", 1, None]},
    {"const": {"a": 1}},
    {"type": "integer", "minimum": -3, "maximum": 40, "multipleOf": 7},
    {"type": ["null", "number"]},
    '{"type": "string"}',
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-z]{2,4}$"}}, "required": ["a"]},
    {
        "type": "array",
        "items": {"$ref": "#/$defs/n"},
        "minItems": 1,
        "$defs": {"n": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/n"}]}},
    },
    {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "string", "format": "date-time"},
    {"allOf": [{}, {"not": {}}]},
    {"patternProperties": {"^x": {"type": "number"}}, "additionalProperties": False},
    {"$ref": "#/nowhere"},
)
WORDS = (
    "type",
    "properties",
    "items",
    "enum",
    "const",
    "pattern",
    "minimum",
    "maxLength",
    "multipleOf",
    "$ref",
    "anyOf",
    "allOf",
    "oneOf",
    "not",
    "if",
    "required",
    "additionalProperties",
    "format",
    "minItems",
    "uniqueItems",
    "$defs",
)
REGEXES: Values = (
    "a",
    "[a-z]+",
    "(fox|dog) {0,3}",
    r"\d{1,3}(\.\d+)?",
    r"\p{L}*",
    "(?i)yes|no",
    "((a*)*)*b",
    "[^\x00-\x7f]{4}",
    "",
)
BAD_REGEXES: Values = ("(", "a{100000}", "(?=x)", r"\1", "[" * 400, "(a{50}){50}" * 20)
GRAMMARS: Values = (
    'start: "a" | "b" start',
    "start: /[0-9]+/",
    'root ::= "yes" | "no"',
    'root ::= [a-z]{1,3} ("," root)?',
    "start: %json {}",
)
BAD_GRAMMARS: Values = (
    "root ::= root",
    "start:",
    "",
    "%%",
    "start: start",
    'start: x\nx: "a"\nx: "b"',
    "start: /(/",
    "(" * 300,
)
CHOICES: Values = (["yes", "no"], ["a"], ["fox", "fox dog"], ["\N{SNOWMAN}"], ["a" * 300] * 40)
NAMES = ("weather", "now", "f", "a b", "", "x" * 70, "\N{SNOWMAN}", "functions.f:0")
# What models write around calls, whole and cut, and what lies close to it.
CALLS = (
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    "<tool_call>",
    "</tool_call>",
    '{"name": "f"',
    "[TOOL_CALLS]",
    '[{"name": "now", "arguments": {}}]',
    "<function=f>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    "<arg_key>a</arg_key>",
    "<arg_value>NaN</arg_value>",
    '<invoke name="f">',
    "<|tool_call_begin|>functions.f:0",
    "<|tool_call_argument_begin|>",
    "[f(a=1, b='x')]",
    "[f(a=",
    '"parameters": ',
    "<|python_tag|>",
    "<think>",
    "</think>",
    "1e999",
    "Infinity",
    '"\\ud800"',
    "}" * 9,
    "[[" * 40,
    "now\n",
)
REFUSED = 15  # percent of the values


def schema(draw: Draw) -> Any:
    """A JSON schema, most often a sound one."""
    found = draw.one(SCHEMAS)
    if isinstance(found, dict) and draw.often(30):
        found = {**found, draw.one(WORDS): draw.one((*SCHEMAS, 1, -1, 10**30, 0.5, "", [], ["a"], None))}
    return {"type": "object", "properties": {"a": found}} if draw.often(20) else found


def tool(draw: Draw) -> dict[str, Any]:
    """A function that a model may call."""
    function: dict[str, Any] = {"name": draw.one(NAMES), "description": "says what it does"}
    if draw.often(80):
        function["parameters"] = schema(draw)
    if draw.often(30):
        function["strict"] = draw.often(70)
    return {"type": "function", "function": function}


def tool_calls(draw: Draw) -> list[Any]:
    """The calls of an assistant's message."""
    arguments = ('{"a": 1}', {"a": "b"}, "", "{", "null", "NaN", None, '{"a": ' + "[" * 80 + "]" * 80 + "}")
    return [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": draw.one(NAMES), "arguments": draw.one(arguments)},
        }
        for _ in range(draw.below(3))
    ]


def _tags(draw: Draw) -> Any:
    triggers = draw.one((["<f="], ["<", "<f="], ["</s>"], ["a", "b"]))
    begins = [draw.one((*triggers, "c")) + draw.one(("x>", "", "</s>")) for _ in range(1 + draw.below(3))]
    return {
        "structures": [
            {"begin": begin, "schema": schema(draw), "end": draw.one(("</f>", ""))} for begin in begins
        ],
        "triggers": triggers,
    }


def _format(draw: Draw, levels: int = 3) -> Any:
    """A format of structural tags."""

    def inner() -> Any:
        return _format(draw, levels - 1)

    parts: tuple[Any, ...] = (
        {"type": "const_string", "value": draw.one(("", "a", "</s>", "yes"))},
        {"type": "json_schema", "json_schema": schema(draw)},
        {"type": "regex", "pattern": draw.one((*REGEXES, *BAD_REGEXES))},
        {"type": "grammar", "grammar": draw.one((*GRAMMARS, *BAD_GRAMMARS))},
        {"type": "any_text"},
    )
    if levels == 0 or draw.often(30):
        return draw.one(parts)
    tags = [
        {
            "type": "tag",
            "begin": draw.one(("<", "<a>", "")),
            "content": inner(),
            "end": draw.one((">", "", ["a", "b"])),
        }
    ]
    return draw.one(
        (
            {"type": draw.one(("sequence", "or")), "elements": [inner() for _ in range(draw.below(4))]},
            {"type": draw.one(("optional", "plus", "star")), "content": inner()},
            {"type": "repeat", "min": draw.below(3), "max": draw.one((-1, 2, 20_000)), "content": inner()},
            *tags,
            {"type": "triggered_tags", "triggers": ["<"], "tags": tags, "at_least_one": draw.often(50)},
            {"type": "tags_with_separator", "tags": tags, "separator": draw.one((",", ""))},
        )
    )


def _response_format(draw: Draw) -> Any:
    held = {"name": "n", "schema": schema(draw), **({"strict": draw.often(50)} if draw.often(30) else {})}
    return draw.one(
        (
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": held},
            {"type": "json_schema"},
            {"type": "structural_tag", **_tags(draw)},
            {"type": "structural_tag", "format": _format(draw)},
        )
    )


def _structured_outputs(draw: Draw) -> Any:
    kinds: dict[str, Any] = {
        "json": schema(draw),
        "regex": draw.one((*REGEXES, *BAD_REGEXES)),
        "choice": draw.one(CHOICES),
        "grammar": draw.one((*GRAMMARS, *BAD_GRAMMARS)),
        "json_object": draw.often(80),
        "structural_tag": _tags(draw),
    }
    names = [draw.one(list(kinds)) for _ in range(1 if draw.often(90) else 2)]
    options = {
        "whitespace_pattern": draw.one((*REGEXES, *BAD_REGEXES)),
        "disable_additional_properties": True,
    }
    more = {"disable_any_whitespace": True} if draw.often(20) else options if draw.often(20) else {}
    return {name: kinds[name] for name in names} | more


def _tool_choice(draw: Draw) -> Any:
    named = {"type": "function", "function": {"name": draw.one(NAMES[:3])}}
    return draw.one(("none", "auto", "required", named, "f", {}))


def _one_of(*values: Any, bad: Values = ()) -> Callable[[Draw], Any]:
    """Draws a value, seldom one of those that are refused."""
    return lambda draw: draw.one(bad) if bad and draw.often(REFUSED) else draw.one(values)


FLAG = _one_of(True, False)
FRACTION = _one_of(0.0, 0.1, 0.5, 1.0, 1)
SHIFT = _one_of(-2.0, -0.5, 0.0, 1, 2.0)
TEXTS = _one_of("a fox", ["a", "the quick brown fox"], ["x"] * 30, "\N{SNOWMAN}" * 50, bad=([], "", [""]))

FIELDS: dict[str, Callable[[Draw], Any]] = {
    "model": _one_of("some", "tuned", "tuned", "other", "", "m" * 200),
    "temperature": _one_of(0, 0.5, 1.0, 2.0, bad=(100.0, -1)),
    "top_p": FRACTION,
    "top_k": _one_of(-1, 0, 1, 5, 400),
    "min_p": FRACTION,
    "repetition_penalty": _one_of(0.5, 1.0, 1.1, 10.0),
    "presence_penalty": SHIFT,
    "frequency_penalty": SHIFT,
    "logit_bias": _one_of(
        {},
        {"5": 1.5, "7": -100},
        {"299": 100},
        {str(n): -1 for n in range(290)},
        bad=({"300000": 1}, {"x": 1}),
    ),
    "allowed_token_ids": _one_of([5], [1, 2, 3], list(range(290)), bad=([10**6], [])),
    "bad_words": _one_of(["fox"], ["a", " a"], ["a"] * 1024, bad=([""], ["x" * 500])),
    "min_tokens": _one_of(0, 1, bad=(5, 10_000)),
    "seed": _one_of(0, 7, -1, 2**63 - 1),
    "stop_token_ids": _one_of([5], [], [2, 290], bad=([10**6],)),
    "ignore_eos": FLAG,
    "max_tokens": _one_of(0, 1, 5, 12, 100, bad=(10_000,)),
    "max_completion_tokens": _one_of(0, 1, 5, 12, 100, bad=(10_000,)),
    "n": _one_of(1, 2, 3, 20, 1024),
    "best_of": _one_of(1, 2, 5),
    "stop": _one_of("fox", ["fox", "a"], [], ["\n"], ["</s>", "x" * 300], bad=("", [""])),
    "include_stop_str_in_output": FLAG,
    "skip_special_tokens": FLAG,
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": schema,
    "guided_regex": _one_of(*REGEXES, bad=BAD_REGEXES),
    "guided_choice": _one_of(*CHOICES, bad=([],)),
    "guided_grammar": _one_of(*GRAMMARS, bad=BAD_GRAMMARS),
    "prompt_logprobs": _one_of(0, 1, 3, 20, 1000),
    "truncate_prompt_tokens": _one_of(-1, 1, 5, 100, 2**31 - 1, bad=(0,)),
    "truncation_side": _one_of("left", "right", bad=("top",)),
    "add_special_tokens": FLAG,
    "return_token_ids": FLAG,
    "return_tokens_as_token_ids": FLAG,
    "logprobs": _one_of(True, True, False, 0, 1, 5, 20),
    "top_logprobs": _one_of(0, 1, 3, 20),
    "echo": FLAG,
    "chat_template_kwargs": _one_of(
        {}, {"enable_thinking": False}, {"x": {"y": [1]}}, bad=({"messages": []},)
    ),
    "reasoning_effort": _one_of("low", "medium", "high", "none", ""),
    "add_generation_prompt": FLAG,
    "continue_final_message": FLAG,
    "documents": _one_of(
        ["a", "fox"], ["a"] * 40, bad=([{"title": "t"}], [{"text": 1}], "a", [], [{"text": "a"}])
    ),
    "include_reasoning": FLAG,
    "tools": lambda draw: [tool(draw) for _ in range(draw.below(4))],
    "tool_choice": _tool_choice,
    "parallel_tool_calls": FLAG,
    "choices": _one_of(*CHOICES, [[5], [6, 7]], ["a", [5]], [" fox", " dog"] * 30, bad=([], ["a", ""])),
    "is_greedy": FLAG,
    "encoding_format": _one_of("float", "base64"),
    "pooling": _one_of("mean", "last", "cls"),
    "normalize": FLAG,
    "dimensions": _one_of(1, 4, 8, bad=(9, 1000)),
    "prompt_name": _one_of("query", "document", "nothing", ""),
    "instruction": _one_of("find it", "", "\n" * 50),
    "use_activation": FLAG,
    "activation": FLAG,
    "top_n": _one_of(0, 1, 5, 2**31 - 1),
    "return_documents": FLAG,
    "query": _one_of("a fox", "what? " * 60, ""),
    "queries": TEXTS,
    "text_1": TEXTS,
    "text_2": TEXTS,
    "items": TEXTS,
    "data_1": TEXTS,
    "data_2": TEXTS,
}
