"""Answers that are held to a grammar: they obey it, in any batch, broken off or not, and errors are found before."""

# ruff: noqa: E501 - tables of whole sentences

from __future__ import annotations

import functools
import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.batch.answers import result_line
from mpillm.comm.program import start
from mpillm.comm.world import World
from mpillm.engine.request import Request
from mpillm.errors import RequestError
from mpillm.text import load_tokenizer
from mpillm.text.constrain import Matcher, choice_grammar, json_grammar, regex_grammar, text_grammar
from tests.agnostic import harness
from tests.conftest import Mpi
from tests.e2e.jobs import results, run, write_lines
from tests.job_helpers import CHAT, END, TEXT, WITH_TEXT, errors, works
from tests.model.engine_harness import run_engine
from tests.text import schema_suite, vocabularies
from tests.text.vocabularies import write_directory

LABELS = ["positive", "negative", "neutral", 'a "quoted" one', "caf\u00e9 \\n"]
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["good", "bad", "neither"]},
        "sure": {"type": "boolean"},
        "places": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 999},
            "maxItems": 3,
        },
    },
    "required": ["label", "sure", "places"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}

# Triggers that the text of a random model has soon.
TAGS = {
    "type": "structural_tag",
    "structures": [
        {"begin": "e", "schema": {"type": "integer"}, "end": ";"},
        {"begin": "a", "schema": {"type": "boolean"}, "end": ""},
    ],
    "triggers": ["e", "a"],
}


def obeys_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["label", "sure", "places"]
        and value["label"] in ("good", "bad", "neither")
        and isinstance(value["sure"], bool)
        and len(value["places"]) <= 3
        and all(type(place) is int and 0 <= place <= 999 for place in value["places"])
    )


# Each body, what its answers must be, and how many of them there are.
BODIES: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": FORMAT}, obeys_schema),
    ({"response_format": FORMAT, "temperature": 1.0, "n": 3, "logprobs": 1}, obeys_schema),
    ({"guided_json": json.dumps(SCHEMA), "temperature": 2.0, "n": 4}, obeys_schema),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}, "temperature": 1.0}, lambda t: obeys_schema(t) and " " not in t),
    ({"structured_outputs": {"choice": LABELS}, "temperature": 3.0, "n": 8}, LABELS.__contains__),
    ({"guided_choice": LABELS[3:], "logprobs": 2}, LABELS[3:].__contains__),
    ({"guided_choice": ["only"]}, ["only"].__contains__),
    ({"guided_choice": ["only"], "echo": True, "logprobs": 0}, lambda t: t == "the quick fox" + "only"),
    ({"guided_regex": "[a-c]{3}(x|yz)*", "temperature": 5.0, "n": 4, "max_tokens": 300}, re.compile("[a-c]{3}(x|yz)*").fullmatch),
    ({"guided_grammar": 'root ::= "ab" | "<" root ">"', "temperature": 1.0, "n": 2}, re.compile("(<*)ab(>*)").fullmatch),
    ({"guided_grammar": 'start: "x" | "(" start ")"', "temperature": 1.0, "n": 2}, re.compile(r"\(*x\)*").fullmatch),
    ({"response_format": TAGS, "temperature": 1.0, "n": 2, "max_tokens": 25}, re.compile(r"([^ae]|e(0|-?[1-9][0-9]*);|a(true|false))*", re.DOTALL).fullmatch),
    ({"structured_outputs": {"json": {**SCHEMA, "additionalProperties": True}, "whitespace_pattern": "_?", "disable_additional_properties": True}, "temperature": 1.0}, lambda t: obeys_schema(t.replace("_", ""))),
]  # fmt: skip


@functools.cache
def world() -> World:
    return start()


def made(folder: Path) -> list[Any]:
    return works(folder, *({"prompt": "the quick fox", "max_tokens": 150, **body} for body, _ in BODIES))


def texts(work: Any, completions: Any) -> list[str]:
    body = json.loads(result_line(work, completions, WITH_TEXT))["response"]["body"]
    return [choice["text"] for choice in body["choices"]]


def test_answers_obey_in_any_batch(tmp_path: Path) -> None:
    all_works = made(tmp_path)
    asked: list[Request] = [request for work in all_works for request in work.requests]
    found = run_engine(CHAT, asked)
    by_name = {(one.request.id, one.request.choice): one for one in found}
    complete = 0
    for work, (_, obeys) in zip(all_works, BODIES, strict=True):
        completions = [by_name[one.id, one.choice] for one in work.requests]
        for completion, text in zip(completions, texts(work, completions), strict=True):
            complete += completion.finish_reason == "stop"
            assert completion.finish_reason == "length" or obeys(text), text
            if completion.request.logprobs is not None:
                assert len(completion.logprobs) == len(completion.tokens)
    assert complete > len(asked) * 0.7
    for job in (
        {"max_num_seqs": 1, "prefix_sharing": False},
        {"max_num_seqs": 5, "max_num_batched_tokens": 16},
    ):
        again = run_engine(CHAT, asked, **job)
        assert [harness.values(one) for one in again] == [harness.values(one) for one in found]


def test_forced_tokens_take_no_steps_and_change_nothing(tmp_path: Path) -> None:
    body = {"prompt": "the", "guided_json": SCHEMA, "temperature": 1.0, "max_tokens": 100}
    free, shown = works(tmp_path, {**body, "custom_id": "a"}, {**body, "logprobs": 0, "custom_id": "b"})
    (one,) = free.requests
    other = Request(**{**{key: getattr(shown.requests[0], key) for key in Request.__slots__}, "id": "a"})
    fast, slow = (harness.run(world(), CHAT, [request], speculation="off") for request in (one, other))
    assert fast.values["a", 0][0] == slow.values["a", 0][0]
    assert fast.totals.generated_tokens == slow.totals.generated_tokens == len(fast.values["a", 0][0])
    assert fast.totals.steps < slow.totals.steps * 0.7
    drafted = harness.run(world(), CHAT, [other], speculation="prompt-lookup")
    assert drafted.values == slow.values
    assert drafted.totals.steps <= fast.totals.steps


def test_a_run_that_is_broken_off_and_resumed(tmp_path: Path) -> None:
    asked = [request for work in made(tmp_path) for request in work.requests]
    whole = harness.run(world(), CHAT, asked)
    assert harness.run_in_pieces(world(), CHAT, asked, seed=4).values == whole.values
    assert harness.run(world(), CHAT, asked, kv_blocks=14).values == whole.values
    drafted = harness.run(world(), CHAT, asked, speculation="prompt-lookup")
    assert drafted.values == whole.values
    assert drafted.totals.accepted_tokens > 0


@pytest.mark.mpiexec
def test_the_same_bytes_in_any_layout(openmpi: Mpi, tmp_path: Path) -> None:
    """And a job's own schema holds for lines that have none."""
    lines = [{"prompt": "the quick fox", "max_tokens": 150, **body} for body, _ in BODIES] + [{"prompt": "a"}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    own = "sampling.structured_outputs.choice=['yes', 'no']"
    for name, ranks, layout in (("one", 1, "stages=1"), ("shards", 2, "shards=2"), ("stages", 2, "stages=2")):
        done = run(openmpi, ranks, source, tmp_path / name, own, f"layout.{layout}")
        assert done.returncode == 0, done.stderr
    found = {name: (tmp_path / name / "results.jsonl").read_bytes() for name in ("one", "shards", "stages")}
    assert found["one"] == found["shards"] == found["stages"]
    assert results(tmp_path / "one")[-1]["response"]["body"]["choices"][0]["text"] in ("yes", "no")


def walk(matcher: Matcher, tokenizer: Any, end_ids: frozenset[int], seed: int, steps: int = 200) -> list[int]:
    """Tokens that the masks allow, drawn at random."""
    rng, ids = np.random.default_rng(seed), []
    while not matcher.ended and len(ids) < steps:
        allowed = np.flatnonzero(np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little"))
        if matcher.forced:
            assert allowed.tolist() == matcher.forced[:1]
        token = int(rng.choice(allowed))
        if token in end_ids:
            break
        ids.append(token)
        matcher.push(token)
    assert matcher.complete
    return ids


@pytest.mark.parametrize("style", sorted(vocabularies.STYLES))
def test_every_style_of_tokenizer(style: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_directory(tmp_path, style))
    assert tokenizer is not None
    ends = tokenizer.end_ids
    grammars = tokenizer.grammars(tokenizer.vocab_size + 7, ends)
    for seed in range(4):
        for grammar, obeys in (
            (json_grammar(SCHEMA), obeys_schema),
            (choice_grammar(LABELS), LABELS.__contains__),
            (regex_grammar("[a-c]{3}( fox|\u00e9)*"), re.compile("[a-c]{3}( fox|\u00e9)*").fullmatch),
        ):
            ids = walk(grammars.matcher(grammar), tokenizer, ends, seed)
            text = tokenizer.decode(ids, start=False)
            assert len(ids) == 200 or obeys(text), text
            replayed = grammars.matcher(grammar)
            for token in ids:
                replayed.push(token)
            assert replayed.forced == [] or len(ids) == 200


# A schema, what it accepts, and what it does not; the keywords that llguidance says it takes.
SCHEMAS: list[tuple[Any, list[Any], list[Any]]] = [
    ({"type": "integer"}, [0, -3, 12345], [1.5, "1", None, True]),
    ({"type": ["string", "null"]}, ["", "a \N{SNOWMAN}", None], [0, [], False]),
    ({"const": {"a": [1, None]}}, [{"a": [1, None]}], [{"a": [1]}, {}, 1]),
    ({"enum": ["x", 2, [False]]}, ["x", 2, [False]], ["y", 3, [True], False]),
    ({"minLength": 2, "maxLength": 3, "type": "string"}, ["ab", "\N{SNOWMAN}bc"], ["a", "abcd", 12]),
    ({"type": "string", "pattern": "^a+b?$"}, ["a", "aaab"], ["b", "ab ", "abb"]),
    ({"type": "string", "pattern": "[0-9]"}, ["a1b", "7"], ["", "ab"]),
    ({"type": "string", "format": "date"}, ["2024-02-28"], ["28.2.2024", "2024-13-01", ""]),
    ({"type": "string", "format": "ipv4"}, ["127.0.0.1"], ["127.0.0", "256.1.1.1"]),
    ({"type": "integer", "minimum": -5, "exclusiveMaximum": 11}, [-5, 0, 10], [-6, 11, 100]),
    ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 2}, [0.75, 1, 2], [0.5, 0, 2.25, -1]),
    ({"type": "integer", "multipleOf": 7}, [0, 7, -14, 98], [1, 8, 99]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}, [[True], [False, True]], [[], [1], [True] * 3]),
    ({"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "string"}}, [[1], [1, "a", "b"]], [[2], [1, 2]]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, [{"a": 1}, {"a": 1, "b": []}], [{}, {"b": 1}, {"a": ""}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"x": 1, "y": 2}], [{"x": ""}, []]),
    ({"type": "object", "patternProperties": {"^n_": {"type": "null"}}, "additionalProperties": False}, [{}, {"n_1": None}], [{"n_1": 1}, {"m": None}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2}, [{"a": 1}, {"a": 1, "b": 2}], [{}, {"a": 1, "b": 2, "c": 3}]),
    ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, [3, "a", ""], ["ab", 1.5, None]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [3, "ab"], [None, [3]]),
    ({"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}, [3, 5], [2, 6]),
    ({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}, [[], [[[]], []]], [[1], {}]),
    (True, [{"a": [None]}, "x", 1e3], []),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "valid", "invalid"), SCHEMAS)
def test_a_schema_accepts_what_is_valid_and_nothing_else(
    schema: Any, valid: list[Any], invalid: list[Any]
) -> None:
    grammars = TEXT.grammars(TEXT.vocab_size, frozenset({END}))
    grammar = json_grammar(schema)
    for value in (*valid, *invalid):
        for indent in (None, 2):
            matcher, accepted = grammars.matcher(grammar), True
            for token in TEXT.encode(json.dumps(value, ensure_ascii=False, indent=indent), False):
                accepted = accepted and not matcher.ended and matcher.accepts(token)
                if accepted:
                    matcher.push(token)
            accepted = accepted and (matcher.ended or matcher.accepts(END))
            assert accepted is any(value is one for one in valid), (value, indent)


BAD = [
    ({"guided_json": {"type": "obj"}}, "it cannot be enforced: Invalid type: obj"),
    ({"guided_json": "{"}, "guided_json: the schema is not JSON: Expecting property name enclosed in double quotes"),
    ({"guided_json": "3"}, "guided_json: a schema must be an object, true or false"),
    ({"guided_json": False}, "guided_json: nothing obeys the schema false"),
    ({"guided_json": {"minLength": 3, "maxLength": 1, "type": "string"}}, "Unsatisfiable schema: minLength (3) is greater than maxLength (1)"),
    ({"guided_json": {"not": {"type": "string"}, "type": "object"}}, 'Unimplemented keys: ["not"]'),
    ({"guided_regex": "("}, "regex parse error"),
    ({"guided_grammar": "start: x"}, 'unknown name: "x"'),
    ({"guided_grammar": "root ::= ("}, "guided_grammar: the grammar cannot be read"),
    ({"guided_choice": []}, "guided_choice: expected a list of length >= 1"),
    ({"structured_outputs": {}}, "it must have one of json, regex, choice, grammar, json_object"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "it must have one of"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs: structural_tag is not JSON: invalid character (byte 0)"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex and guided_choice cannot be used together"),
    ({"response_format": {"type": "json_schema"}}, "response_format: the key 'json_schema' is missing"),
    ({"response_format": {"type": "structural_tag"}}, "response_format: structural tags need a format, or structures and triggers"),
    ({"guided_choice": ["a"], "min_tokens": 3}, "min_tokens and a grammar (or a schema, or choices) cannot be used together"),
]  # fmt: skip


def test_what_no_answer_can_obey_is_an_error_of_its_line(tmp_path: Path) -> None:
    found = errors(tmp_path, *({"prompt": "a", **body} for body, _ in BAD), {"prompt": "a"})
    assert found.pop() is None
    for error, (_, words) in zip(found, BAD, strict=True):
        assert error is not None
        assert words in error
    lenient = {
        "type": "json_schema",
        "json_schema": {"schema": {"not": {}, "type": "object"}, "strict": False},
    }
    assert errors(tmp_path, {"prompt": "a", "response_format": lenient}) == [None]
    assert END in TEXT.end_ids


def references(count: int) -> dict[str, Any]:
    """A schema whose definitions lead from one to the next."""
    links = {f"a{n}": {"type": "array", "items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{count}": {"type": "string"}}}


def rules(count: int) -> str:
    """A grammar whose rules lead from one to the next."""
    return "\n".join(["start: a0", *(f"a{n}: a{n + 1}" for n in range(count)), f'a{count}: "x"'])


TOO_LARGE = [
    ({"guided_json": references(20_000)}, "20001 references ($ref) in the schema; the maximum is 8000"),
    ({"guided_json": {"pattern": "(a|b)*" * 5000}}, "30000 characters of patterns in the schema; the maximum is 16384"),
    ({"guided_json": {"patternProperties": {"(a|b)*" * 5000: {}}}}, "30000 characters of patterns"),
    ({"guided_regex": "(a|b)*" * 5000}, "30000 characters of the regular expression; the maximum is 16384"),
    ({"guided_regex": "(a{300}){300}"}, "the regular expression asks for more than 65536 copies of its parts"),
    ({"guided_json": {"type": "string", "pattern": "^[a\\]{]?(?:b|\\{9){100000,}$"}}, "a pattern of the schema asks for more than 65536 copies"),
    ({"guided_grammar": 'start: "a"{100000}'}, "the grammar asks for more than 65536 copies"),
    ({"guided_choice": [str(n) for n in range(20_001)]}, "20001 texts to choose from; the maximum is 20000"),
    ({"guided_grammar": rules(9000)}, "characters of the grammar; the maximum is 65536"),
    ({"guided_json": {"type": "integer", "multipleOf": 999_983}}, "multipleOf is too large"),
    ({"guided_json": {"allOf": [{"multipleOf": 99.89}, {"items": {"multipleOf": 997}}]}}, "multipleOf is too large"),
]  # fmt: skip


def test_large_grammars_cost_their_line_alone(tmp_path: Path) -> None:
    """The library's recursion ended the process; what is near the bounds is compiled, and runs."""
    near = [
        {"guided_json": references(7900)},
        {"guided_json": {"type": "number", "multipleOf": 29_989, "allOf": [{"multipleOf": 2.5e9}]}},
        {"guided_grammar": rules(4200)},
    ]
    found = errors(tmp_path, *({"prompt": "a", **body} for body in (*near, *(body for body, _ in TOO_LARGE))))
    assert found[: len(near)] == [None] * len(near)
    for error, (_, words) in zip(found[len(near) :], TOO_LARGE, strict=True):
        assert words in str(error)
    grammars = TEXT.grammars(TEXT.vocab_size, frozenset({END}))
    for grammar in (json_grammar(near[0]["guided_json"]), text_grammar(str(near[2]["guided_grammar"]))):
        matcher = grammars.matcher(grammar).copy()
        assert matcher.allowed().any()


def test_a_schema_that_the_library_does_not_take() -> None:
    with pytest.raises(RequestError, match="the schema cannot be read: Value is not JSON serializable: 1000"):
        json_grammar({"minimum": 10**30})


def test_labels_cost_no_more_than_scoring(tmp_path: Path) -> None:
    """Each record gets one of three labels; its text is computed once, and the labels add the steps of one of them."""
    draw, labels = random.Random(3), ["positive", "negative", "neutral"]
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    prompts = ["Label: " + " ".join(draw.choices(words, k=draw.randint(8, 30))) for _ in range(60)]
    cost = {}
    for name, more in (
        ("labels", {"guided_choice": labels}),
        ("scores", {"max_tokens": 0, "echo": True, "logprobs": 0}),
    ):
        made = works(tmp_path, *({"prompt": prompt, **more} for prompt in prompts))
        asked = [request for work in made for request in work.requests]
        found = harness.run(world(), CHAT, asked)
        cost[name] = found.totals
        if name == "labels":
            texts = [TEXT.decode(found.values[one.id, one.choice][0], start=False) for one in asked]
            assert set(texts) == set(labels)
            assert len(texts) == len(prompts)
    assert cost["labels"].prompt_tokens == cost["scores"].prompt_tokens
    assert cost["labels"].recomputed_tokens == 0
    assert cost["labels"].steps <= 1.1 * cost["scores"].steps + max(map(len, labels))


def test_grammars_are_bounded_before_they_are_compiled() -> None:
    with pytest.raises(RequestError, match="values in the schema; the maximum is 100000"):
        json_grammar({"enum": list(range(100_000))})
    grammars = TEXT.grammars(TEXT.vocab_size, frozenset({END}))
    with pytest.raises(RequestError, match="characters of the grammar; the maximum is 1048576"):
        grammars.check(choice_grammar([f"{'x' * 60} {number}" for number in range(20_000)]))


# Schemas and grammars that nothing obeys, for what does would never end, or begin.
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
ENDLESS: list[dict[str, Any]] = [
    {"guided_json": {"$ref": "#/$defs/node", "$defs": {"node": NODE}}},
    {"guided_json": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}},
    {"guided_json": {"allOf": [{"type": "object"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}}},
    {"guided_grammar": "start: start"},
    {"guided_grammar": "root ::= root"},
    {"guided_regex": "[^\\x00-\\U0010ffff]"},
]  # fmt: skip
OPEN = {**NODE, "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
ENDING: list[dict[str, Any]] = [
    {"guided_json": {"$ref": "#/$defs/node", "$defs": {"node": OPEN}}},
    {"guided_json": {"type": "array", "items": {"$ref": "#"}}},
    {"guided_json": {"$ref": "#/$defs/a", "$defs": {name: {"$ref": f"#/$defs/{after}"} for name, after in pairwise("abcdef")} | {"f": {}}}},
    {"guided_grammar": "root ::= "},
    {"guided_regex": ""},
]  # fmt: skip


def test_what_nothing_obeys_is_an_error_of_its_line(tmp_path: Path) -> None:
    found = errors(tmp_path, *({"prompt": "a", **body} for body in [*ENDLESS, *ENDING]))
    for error, body in zip(found, ENDLESS, strict=False):
        assert re.search("(nothing|no finite value) obeys", str(error)), body
    assert found[len(ENDLESS) :] == [None] * len(ENDING)


def test_an_answer_that_leads_nowhere_is_no_whole_one(tmp_path: Path) -> None:
    """Where a grammar forbids any end, which is not seen before, the answer is not said to be complete."""
    body = {
        "prompt": "a",
        "guided_grammar": 'start: "a" | "b" rest\nrest: rest',
        "logit_bias": {"71": 50},
    }
    (work,) = works(tmp_path, {**body, "max_tokens": 9})
    (completion,) = run_engine(CHAT, work.requests)
    assert completion.finish_reason == "length"


def test_the_public_schemas_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A suite in the form of the public one: what is expected of each case, and one that does worse."""
    folder = tmp_path / "tests" / "draft7"
    folder.mkdir(parents=True)
    tests = [
        {"description": "a", "data": 12, "valid": True},
        {"description": "b", "data": "x", "valid": False},
    ]
    unknown = {"description": "not", "schema": {"not": {"type": "integer"}}, "tests": tests}
    group = {"description": "type", "schema": {"type": "integer"}, "tests": tests}
    (folder / "type.json").write_text(json.dumps([group, unknown]))
    expected = {"type": {"a": "pass", "b": "pass"}, "not": {"a": "skip_compile", "b": "skip_compile"}}
    (tmp_path / "expected.json").write_text(json.dumps({"draft7": {"type": expected}}))
    assert schema_suite.main(tmp_path, tmp_path / "expected.json") == 0
    expected["not"]["b"] = "pass"
    (tmp_path / "expected.json").write_text(json.dumps({"draft7": {"type": expected}}))
    assert schema_suite.main(tmp_path, tmp_path / "expected.json") == 1
    assert "type / not / b: pass -> skip_compile" in capsys.readouterr().out
