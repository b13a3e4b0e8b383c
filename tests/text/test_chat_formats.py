"""Answers of chat models: reasoning, content and tool calls apart, whole and as they grow, and held to grammars."""

# ruff: noqa: E501 - answers as models write them

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, get_args

import numpy as np
import pytest

from mpillm.errors import RequestError
from mpillm.spec.sections import ToolCalls
from mpillm.text import Tokenizer, hf
from mpillm.text.chat_formats.bare import Pythonic
from mpillm.text.chat_formats.base import ParsedAnswer, Tool
from mpillm.text.chat_formats.escaped import Escaped
from mpillm.text.chat_formats.in_tags import Tags
from mpillm.text.chat_formats.known import CALLS, TAGS, format_of
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.chat_formats.tagged import AnswerRule, ChatFormat, ReasoningState, Tagged
from mpillm.text.constrain import Grammars, choice_grammar
from mpillm.text.harmony import CALL, CONSTRAIN, MARKS, Harmony
from tests.job_helpers import CHAT

HARMONY = (*MARKS, CONSTRAIN, CALL)

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["C", "F"]},
        "where": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
    "required": ["city", "where"],
    "additionalProperties": False,
}
TOOLS = [
    Tool("weather", SCHEMA, True),
    Tool("now", {"type": "object", "properties": {}, "additionalProperties": False}, True),
]
ONE = {"city": 'New <b>York</b>\nat "night"', "days": 3, "where": {"x": True}}
CALLED = [("weather", ONE), ("now", {})]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def ds(text: str) -> str:
    """A text with DeepSeek's marks, which are written [[call_begin]] here."""
    return re.sub(
        r"\[\[(.*?)\]\]",
        lambda found: "<\uff5ctool\u2581" + found[1].replace("_", "\u2581") + "\uff5c>",
        text,
    )


def _tags(key: str, value: str, stop: str, pad: str = "") -> str:
    texts = [(name, item if isinstance(item, str) else _json(item)) for name, item in ONE.items()]
    return "".join(f"{key}{name}{value}{pad}{text}{pad}{stop}\n" for name, text in texts)


def _dsml(frame: str, *calls: str) -> str:
    """Calls in DeepSeek's markup, which is written <ds: and </ds: here."""
    text = f"<ds:{frame}>\n" + "\n".join(calls) + f"\n</ds:{frame}>"
    return text.replace("ds:", "\uff5cDSML\uff5c")


DSML = "".join(
    f'<ds:parameter name="{name}" string="{_json(isinstance(item, str))}">{item if isinstance(item, str) else _json(item)}</ds:parameter>\n'
    for name, item in ONE.items()
)
DSML_CALLS = (f'<ds:invoke name="weather">\n{DSML}</ds:invoke>', '<ds:invoke name="now">\n</ds:invoke>')

# Both calls as each model writes them.
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {_json(ONE)}}}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=weather>\n" + _tags("<parameter=", ">", "</parameter>", "\n") + "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "seed_oss": "<seed:tool_call>\n<function=weather>\n" + _tags("<parameter=", ">", "</parameter>") + "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    "glm": "<tool_call>weather\n" + _tags("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>") + "</tool_call>\n<tool_call>now\n</tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="weather">\n' + _tags('<parameter name="', '">', "</parameter>") + '</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "deepseek_v32": _dsml("function_calls", *DSML_CALLS),
    "deepseek_v4": _dsml("tool_calls", *DSML_CALLS),
    "deepseek_v3": ds(f"[[calls_begin]][[call_begin]]function[[sep]]weather\n```json\n{_json(ONE)}\n```[[call_end]]\n[[call_begin]]function[[sep]]now\n```json\n{{}}\n```[[call_end]][[calls_end]]"),
    "deepseek_v31": ds(f"[[calls_begin]][[call_begin]]weather[[sep]]{_json(ONE)}[[call_end]][[call_begin]]now[[sep]]{{}}[[call_end]][[calls_end]]"),
    "kimi": f"<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{_json(ONE)}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|><|tool_calls_section_end|>",
    "mistral": f'[TOOL_CALLS][{{"name": "weather", "arguments": {_json(ONE)}}}, {{"name": "now", "arguments": {{}}}}]',
    "mistral_args": f"[TOOL_CALLS]weather[ARGS]{_json(ONE)}[TOOL_CALLS]now[ARGS]{{}}",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {_json(ONE)}}}, {{"name": "now", "arguments": {{}}}}]',
    "phi4_mini": f'<|tool_call|>[{{"name": "weather", "arguments": {_json(ONE)}}}, {{"name": "now", "arguments": {{}}}}]<|/tool_call|>',
    "cohere": f'<|START_ACTION|>\n[{{"tool_call_id": "0", "tool_name": "weather", "parameters": {_json(ONE)}}}, {{"tool_call_id": "1", "tool_name": "now", "parameters": {{}}}}]\n<|END_ACTION|>',
    "command_r": f'Action:```json\n[{{"tool_name": "weather", "parameters": {_json(ONE)}}}, {{"tool_name": "now", "parameters": {{}}}}]\n```',
    "functiongemma": f"<start_function_call>call:weather{{city:<escape>{ONE['city']}<escape>,days:3,where:{{x:true}}}}<end_function_call><start_function_call>call:now{{}}<end_function_call>",
    "gemma4": f'<|tool_call>call:weather{{city:<|"|>{ONE["city"]}<|"|>,days:3,where:{{x:true}}}}<tool_call|><|tool_call>call:now{{}}<tool_call|>',
    "tool_calls": f'<tool_calls>[{{"name": "weather", "arguments": {_json(ONE)}}}, {{"name": "now", "arguments": {{}}}}]</tool_calls>',
    "nemotron": f'<TOOLCALL>[{{"name": "weather", "arguments": {_json(ONE)}}}, {{"name": "now", "arguments": {{}}}}]</TOOLCALL>',
    "llama3_json": f'{{"name": "weather", "parameters": {_json(ONE)}}}; {{"name": "now", "parameters": {{}}}}',
    "pythonic": f'[weather(city={_json(ONE["city"])}, days=3, where={{"x": True}}), now()]',
    "lfm2": f'<|tool_call_start|>[weather(city={_json(ONE["city"])}, days=3, where={{"x": True}}), now()]<|tool_call_end|>',
    "olmo3": f'<function_calls>weather(city={_json(ONE["city"])}, days=3, where={{"x": True}})\nnow()</function_calls>',
}  # fmt: skip
NOW = {
    **{
        name: text.partition("</tool_call>\n")[2]
        for name, text in WRITTEN.items()
        if "</tool_call>\n" in text
    },
    "seed_oss": WRITTEN["seed_oss"].partition("</seed:tool_call>\n")[2],
    "minimax": '<minimax:tool_call>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    "deepseek_v32": _dsml("function_calls", DSML_CALLS[1]),
    "deepseek_v4": _dsml("tool_calls", DSML_CALLS[1]),
    "deepseek_v3": ds(
        "[[calls_begin]][[call_begin]]function[[sep]]now\n```json\n{}\n```[[call_end]][[calls_end]]"
    ),
    "deepseek_v31": ds("[[calls_begin]][[call_begin]]now[[sep]]{}[[call_end]][[calls_end]]"),
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:12<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "mistral": '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
    "mistral_args": "[TOOL_CALLS]now[ARGS]{}",
    "granite": '<|tool_call|>[{"name": "now", "arguments": {}}]',
    "phi4_mini": '<|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>',
    "cohere": '<|START_ACTION|>\n[{"tool_call_id": "12", "tool_name": "now", "parameters": {}}]\n<|END_ACTION|>',
    "command_r": 'Action:```json\n[{"tool_name": "now", "parameters": {}}]\n```',
    "functiongemma": "<start_function_call>call:now{}<end_function_call>",
    "gemma4": "<|tool_call>call:now{}<tool_call|>",
    "tool_calls": '<tool_calls>[{"name": "now", "arguments": {}}]</tool_calls>',
    "nemotron": '<TOOLCALL>[{"name": "now", "arguments": {}}]</TOOLCALL>',
    "llama3_json": '{"name": "now", "parameters": {}}',
    "pythonic": "[now()]",
    "lfm2": "<|tool_call_start|>[now()]<|tool_call_end|>",
    "olmo3": "<function_calls>now()</function_calls>",
}
BARE = {"pythonic"}  # calls are the whole answer
IDS = {"kimi": ["functions.weather:0", "functions.now:1"], "cohere": ["0", "1"]}  # of the model's own


def found(answer: ParsedAnswer) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


def grown(format: ChatFormat, text: str, state: ReasoningState) -> ParsedAnswer:
    """The parts of an answer, of which each beginning was looked at, too: none took back what another had given."""
    last = ParsedAnswer(None, "")
    for length in range(len(text) + 1):
        answer = format.split(text[:length], state, TOOLS, final=False)
        assert (answer.reasoning or "").startswith(last.reasoning or "")
        assert answer.content.startswith(last.content)
        assert answer.calls[: len(last.calls)] == last.calls
        last = answer
    whole = format.split(text, state, TOOLS, final=True)
    assert (whole.reasoning or "").startswith(last.reasoning or "")
    assert whole.content.startswith(last.content)
    assert whole.calls[: len(last.calls)] == last.calls
    return whole


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("thought", [None, "\nis it <b>cold</b>?\n"])
def test_calls_of_each_format(name: str, thought: str | None) -> None:
    format = Tagged(("<think>", "</think>"), CALLS[name])
    before = "" if thought is None else f"<think>{thought}</think>\n\n"
    for said in ("",) if name in BARE else ("", "Let me see."):
        whole = grown(format, f"{before}{said}{WRITTEN[name]}", "free")
        assert (found(whole), whole.content) == (CALLED, said)
        assert whole.reasoning == (thought and thought.strip())
    assert set(WRITTEN) == set(CALLS) == set(get_args(ToolCalls)) - {"auto", "none"}
    ids = [call.id for call in whole.calls]
    assert ids == IDS.get(name, [None, None])


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_call_is_content(name: str) -> None:
    format = Tagged(None, CALLS[name])
    written = WRITTEN[name]
    for text in (
        "No, 3 < 4.",
        "{not JSON}",
        "[1, 2]",
        "",
        '{"name": "Ann", "parameters": 3}',
        "[weather",
        "a [b] <c>",
    ):
        assert grown(format, text, "free") == ParsedAnswer(None, text)
    broken = grown(format, written[: len(written) // 3], "free")  # as max_tokens cuts it
    assert not broken.calls
    assert "wea" in broken.content
    assert format.split(written, "free", None, True) == ParsedAnswer(None, written)


OSLO, NO_ARGUMENTS = ("weather", {"city": "Oslo"}), ("now", {})
# What models also write: what is said beside the calls, and the calls.
VARIANTS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}', "", [OSLO]),
    ("hermes", '<tool_call>{"arguments": "{\\"city\\": \\"Oslo\\"}",\n"name": "weather"}</tool_call><tool_call>{"name": "now", "arguments": null}</tool_call>', "", [OSLO, NO_ARGUMENTS]),
    ("hermes", 'a <tool_call>{"name": "now", "arguments": {}}</tool_call> b', "a  b", [NO_ARGUMENTS]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', '<tool_call>{"name": "now"}</tool_call>', []),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "weather", "arguments": {"city": "Oslo"}} ;\n{"name": "now", "parameters": {}}', "", [OSLO, NO_ARGUMENTS]),
    ("llama3_json", 'Here: {"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"city": "Oslo"}} with {x} and {"a": 1}', "Here: with {x} and {\"a\": 1}", [NO_ARGUMENTS, OSLO]),
    ("llama3_json", 'Use {"name": "later", "parameters": {}}', 'Use {"name": "later", "parameters": {}}', []),
    ("tool_calls", '<tool_calls>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n{"name": "now", "arguments": {}}\n</tool_calls>', "", [OSLO, NO_ARGUMENTS]),
    ("cohere", '<|START_ACTION|>[\n    {"tool_name": "weather", "parameters": {"city": "Oslo"}}\n]<|END_ACTION|>', "", [OSLO]),
    ("lfm2", "<|tool_call_start|>[weather(city='Os\nlo')]<|tool_call_end|>", "", [("weather", {"city": "Os\nlo"})]),
    ("mistral_args", 'So[TOOL_CALLS]weather[CALL_ID]abcdef123[ARGS]{"city": "Oslo"}[TOOL_CALLS]now[ARGS]{}', "So", [OSLO, NO_ARGUMENTS]),
    ("glm", "<tool_call>weather\n    <arg_key>city</arg_key>\n    <arg_value>Oslo</arg_value>\n    </tool_call>\n    <tool_call>now</tool_call>", "", [OSLO, NO_ARGUMENTS]),
    ("glm", "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>", "", [OSLO]),
    ("qwen3_coder", "<function=weather>\n<parameter=city>Oslo</parameter>\n<parameter=days>\n3\n</parameter>\n</function>", "", [("weather", {"city": "Oslo", "days": 3})]),
    ("deepseek_v3", ds('[[calls_begin]][[call_begin]]function[[sep]]weather\n```json\n{"city": "Oslo"}\n```[[call_end]][[call_begin]]function[[sep]]now\n```json\n{}\n```[[call_end]][[calls_end]]'), "", [OSLO, NO_ARGUMENTS]),
    ("deepseek_v31", ds('[[calls_begin]][[call_begin]]weather[[sep]]{"city": [[call_end]][[calls_end]]'), ds('[[calls_begin]][[call_begin]]weather[[sep]]{"city": [[call_end]][[calls_end]]'), []),
    ("kimi", '<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0 <|tool_call_argument_begin|>{\n"city": "Oslo"} <|tool_call_end|><|tool_call_begin|>now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>', "", [OSLO, NO_ARGUMENTS]),
    ("mistral", 'So[TOOL_CALLS] [{"arguments": {"city": "Oslo"}, "name": "weather"}]', "So", [OSLO]),
    ("granite", '<|tool_call|> [{"name": "now", "arguments": {}}]', "", [NO_ARGUMENTS]),
    ("pythonic", "<|python_start|>[weather(city='Oslo', where={'x': True, 'y': (None, -1.5)}), now()]<|python_end|>", "", [("weather", {"city": "Oslo", "where": {"x": True, "y": [None, -1.5]}}), NO_ARGUMENTS]),
    ("gemma4", 'So.<|tool_call>:call:weather{city:<|"|>Os, {lo}]<|"|>, days: 3 , where : {<|"|>x<|"|>:true,y:[1.5,null,[],<|"|>a<|"|>]}}\n<tool_call|>', "So.", [("weather", {"city": "Os, {lo}]", "days": 3, "where": {"x": True, "y": [1.5, None, [], "a"]}})]),
    ("gemma4", '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:None,unit:C}', "", [("weather", {"city": "Oslo", "days": None, "unit": "C"})]),
    ("gemma4", "<|tool_call>call:now{x:[t:[]}<tool_call|>", "<|tool_call>call:now{x:[t:[]}<tool_call|>", []),
    ("functiongemma", "<start_function_call>call:weather{city:<escape>42<escape>,days:<escape>42<escape>}<end_function_call>", "", [("weather", {"city": "42", "days": 42})]),
    ("deepseek_v32", "So.\n\n" + _dsml("function_calls", '<ds:invoke name="weather">', '<ds:parameter name="city" string="true">42</ds:parameter>', '<ds:parameter name="days" string="false">3</ds:parameter>', "</ds:invoke>"), "So.", [("weather", {"city": "42", "days": 3})]),
    ("command_r", 'Plan: look.\nAction: ```json\n[\n    {\n        "tool_name": "weather",\n        "parameters": {"city": "Oslo"}\n    }\n]```', "Plan: look.", [OSLO]),
    ("command_r", 'Action: ```json\n[{"tool_name": "directly_answer", "parameters": {}}]\n```', "", []),
    ("qwen3_coder", "<function=weather>\n<parameter=city>\n42\n</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>", "", [("weather", {"city": "42", "unit": "C"})]),
    ("pythonic", r"[weather(city='\d+\.')]", "", [("weather", {"city": "\\d+\\."})]),
]  # fmt: skip
# Values that JSON does not have, and calls that are none: all of it is content.
NO_JSON = [
    *(("pythonic", f"[now(x={value})]") for value in ("b'z'", "{1}", "{[1]}", "1j", "...", "1e999", "f()", "'\\ud800'")),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"x": "\\ud800"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\udc00", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"x": 1e999}}</tool_call>'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "said", "calls"), VARIANTS)
def test_calls_as_models_also_write_them(
    name: str, text: str, said: str, calls: list[tuple[str, Any]]
) -> None:
    whole = grown(Tagged(None, CALLS[name]), text, "closed")
    assert (whole.content, found(whole)) == (said, calls)
    for cut in range(len(text)):  # as max_tokens cuts it: never a call that the whole has not
        begun = found(Tagged(None, CALLS[name]).split(text[:cut], "closed", TOOLS, final=True))
        assert begun == calls[: len(begun)]


@pytest.mark.parametrize(("name", "text"), NO_JSON)
def test_calls_that_json_cannot_write_are_content(name: str, text: str) -> None:
    assert grown(Tagged(None, CALLS[name]), text, "closed") == ParsedAnswer(None, text)


def test_reasoning() -> None:
    for opening, closing in TAGS:
        format = Tagged((opening, closing), None)
        assert format.state(f"...assistant\n{opening}\n") == "open"
        assert format.state(f"...assistant\n{opening}\n\n{closing}\n\n") == "closed"
        assert format.state("...assistant\n") == "free"
        for state, text, thought, said in (
            ("open", f"\nso\n{closing}\n\n it is", "so", " it is"),
            ("open", f"{opening}\nso\n{closing}yes", "so", "yes"),
            ("open", "never en", "never en", ""),
            ("free", f"{opening}so{closing}yes", "so", "yes"),
            ("free", f"{opening}so", "so", ""),
            ("free", f"no {opening}so{closing}", None, f"no {opening}so{closing}"),
            ("closed", f"{opening}", None, opening),
            ("closed", "yes\n", None, "yes\n"),
            ("free", "\n", None, "\n"),
        ):
            assert grown(format, text, state) == ParsedAnswer(thought, said), (state, text)  # type: ignore[arg-type]
        assert format.continued(f"{opening} so") == "open"
        assert format.continued(f"{opening} so {closing} b") == "closed"
        assert format.continued("b") == "closed"


def test_what_is_said_in_a_frame() -> None:
    format = format_of(["<think></think> <answer> </answer> {{ tools }} <tool_calls>"], [], "auto", "auto")
    for text, thought, said, calls in (
        ("<think>\nso\n</think>\n<answer>\nit\nis\n</answer>", "so", "it\nis", []),
        ("<think>\n\n</think>\n<answer>\nit is", "", "it is", []),
        ("<answer>it < 3</answer>\n", None, "it < 3", []),
        ("it is <answer>", None, "it is <answer>", []),
        (f"<think>so</think><answer>\nOne:\n{NOW['tool_calls']}\n</answer>", "so", "One:", [NO_ARGUMENTS]),
        ("<answe", None, "<answe", []),
    ):
        whole = grown(format, text, "free")
        assert (whole.reasoning, whole.content, found(whole)) == (thought, said, calls), text
        plain = [format.split(text[:length], "free", None, False).content for length in range(len(text))]
        assert all(format.split(text, "free", None, True).content.startswith(begun) for begun in plain)


def test_harmony() -> None:
    thought = "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
    for head in (
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
        " to=functions.weather<|channel|>commentary json<|message|>",
    ):
        whole = grown(Harmony(), thought + head + _json(ONE) + "<|call|>", "open")
        assert (found(whole), whole.content, whole.reasoning) == ([("weather", ONE)], "", "so")
    preamble = "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"
    whole = grown(Harmony(), preamble + head.lstrip().join(["", _json(ONE)]), "open")
    assert whole.content.startswith("Let me see.")


@pytest.mark.parametrize(
    ("template", "tokens", "tags", "name"),
    [
        (
            "{{ tools }}<tool_call> {\"name\": </tool_call> '</think>' in content",
            [],
            ("<think>", "</think>"),
            "hermes",
        ),
        ("{{ tools }}<tool_call>\n<function=x>\n<parameter=y>", [], None, "qwen3_coder"),
        ("{{ tools }}<tool_call>{n}<arg_key>{k}</arg_key> </think>", [], ("<think>", "</think>"), "glm"),
        ("{{ tools }}{{ message.content }}", ["<|tool_call_begin|>"], None, "kimi"),
        (ds("{{ tools }}[[call_begin]]") + "function```json", [], None, "deepseek_v3"),
        (ds("{{ tools }}[[call_begin]]</think>"), [], ("<think>", "</think>"), "deepseek_v31"),
        ("{{ tools }}<|START_ACTION|><|END_THINKING|>", [], TAGS[2], "cohere"),
        ("{{ tools }}<tool_calls>[", [], None, "tool_calls"),
        ("{{ tools }}<TOOLCALL>[", [], None, "nemotron"),
        ("{{ tools }}<function_calls>", [], None, "olmo3"),
        ("{{ tools }}[TOOL_CALLS]", [], None, "mistral"),
        ("{{ tools }}[TOOL_CALLS]", ["[ARGS]", "[TOOL_CALLS]"], None, "mistral_args"),
        ("{{ tools }}<|start_header_id|>ipython", [], None, "llama3_json"),
        ("<tool_call> without a variable", [], None, None),
        ("<|im_start|>", ["<think>"], None, None),
        ("{{ tools }}<seed:tool_call></seed:think>", [], TAGS[0], "seed_oss"),
        (_dsml("{{ tools }}function_calls") + "</think>", [], ("<think>", "</think>"), "deepseek_v32"),
        (_dsml("{{ tools }}tool_calls"), [], None, "deepseek_v4"),
        ("{{ tools }}<start_function_call>call:", [], None, "functiongemma"),
        (
            "{{ tools }}<|channel>thought\n<channel|><|tool_call>call:",
            [],
            ("<|channel>thought\n", "<channel|>"),
            "gemma4",
        ),
        ("{{ tools }}Write 'Action:' followed by a json-formatted list", [], None, "command_r"),
    ],
)
def test_formats_are_known_by_template_and_tokens(
    template: str, tokens: list[str], tags: Any, name: str | None
) -> None:
    format = format_of([template], tokens, "auto", "auto")
    assert isinstance(format, Tagged)
    assert (format.tags, format.calls) == (tags, CALLS.get(name or ""))
    own = format_of([template], tokens, ("<a>", "</a>"), "pythonic")
    assert isinstance(own, Tagged)
    assert (own.tags, own.calls) == (("<a>", "</a>"), CALLS["pythonic"])


@pytest.fixture(scope="module")
def grammars() -> tuple[Any, Grammars]:
    """A tokenizer with the marks of all formats as control tokens but those that are plain text in real models."""
    parts = hf.read(CHAT)
    assert parts is not None
    marks = {
        mark
        for name, calls in CALLS.items()
        for mark in Tagged(("<|channel>thought\n", "<channel|>"), calls).marks
        if mark[0] in "[\uff5c" or (mark[:2] in ("<|", "<\uff5c") and "DSML" not in mark and mark[-1] == ">")
    }
    parts.control |= {*marks - {"[", "]"}, *TAGS[1], *HARMONY}
    tokenizer = Tokenizer(parts)
    return tokenizer, tokenizer.grammars(tokenizer.vocab_size, tokenizer.end_ids)


def obeys(grammars: tuple[Any, Grammars], grammar: str, text: str) -> bool:
    """Whether a text, as the tokenizer cuts it, may be an answer."""
    tokenizer, made = grammars
    matcher = made.matcher(grammar)
    for token in tokenizer.encode(text, False, parse_special=True):
        if matcher.ended or not matcher.allowed().view(np.uint32)[token // 32] >> (token % 32) & 1:
            return False
        matcher.push(token)
    (end,) = tokenizer.end_ids
    return matcher.ended or bool(matcher.allowed().view(np.uint32)[end // 32] >> (end % 32) & 1)


@pytest.mark.parametrize("name", [*CALLS, "harmony"])
def test_grammars_of_calls(grammars: tuple[Any, Grammars], name: str) -> None:
    format = (
        Harmony() if name == "harmony" else Tagged(TAGS[1] if "mistral" in name else TAGS[3], CALLS[name])
    )
    head = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>".format
    call = head("weather") + _json(ONE) if name == "harmony" else WRITTEN[name]
    call = call.replace("True", "true")  # a schema's JSON
    single = head("now") + "{}" if name == "harmony" else NOW[name]
    thought = "<|channel|>analysis<|message|>so [a<|end|><|start|>assistant"
    opening = ""
    if isinstance(format, Tagged):
        assert format.tags is not None
        opening, thought = format.tags[0], f"so <tool_call> [a{format.tags[1]}\n\n"
    content = choice_grammar(["red", "blue"])

    def grammar(
        choice: Any,
        tools: list[Tool],
        answer: bool = False,
        many: bool = True,
        state: ReasoningState = "closed",
    ) -> str:
        lark = Lark(grammars[0].control)
        return lark.whole(
            format.expression(
                lark, state, AnswerRule(lark.embedded(content) if answer else None, tools, choice, many)
            )
        )

    required = grammar("required", TOOLS)
    assert obeys(grammars, required, call)
    assert obeys(grammars, required, single)
    assert not obeys(grammars, required, "No.")
    assert not obeys(grammars, grammar("required", TOOLS[:1]), single)
    assert obeys(grammars, grammar("required", TOOLS, many=False), single)
    if name != "harmony":
        assert not obeys(grammars, grammar("required", TOOLS, many=False), call)
    wrong = call.replace("3", '"x"')
    assert wrong != call
    assert not obeys(grammars, required, wrong)
    auto = grammar("auto", TOOLS)
    final = "<|channel|>final<|message|>" if name == "harmony" else ""
    for text, right in ((call, True), (wrong, False), (single, True), (f"{final}No, [it] <is>.", True)):
        assert obeys(grammars, auto, text) is right, text
    both = grammar("auto", TOOLS, answer=True)
    for text, right in (
        (call, True),
        (f"{final}red", True),
        (f"{final}reddish", False),
        (f"{final}No.", False),
    ):
        assert obeys(grammars, both, text) is right, text
    if name != "harmony":
        assert obeys(grammars, grammar("required", TOOLS, state="open"), thought + call)
        assert not obeys(grammars, grammar("required", TOOLS, state="open"), call)
    free = grammar("none", [], answer=True, state="free")
    for text, right in (
        (f"{opening}{thought}{final}blue", True),
        (f"{final}blue", True),
        (f"{opening}{thought}{final}green", False),
        (f"{opening}{thought}", False),
    ):
        assert obeys(grammars, free, text) is right, text


# Arguments of a strict tool, one that obeys and one that does not; all of them optional, in the schema's order.
KINDS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "a": ({"type": ["string", "null"], "maxLength": 3}, "Ann", "Anna"),
    "b": ({"type": ["integer", "null"]}, None, 1.5),
    "c": ({"$ref": "#/$defs/unit"}, "C", "K"),
    "d": ({"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-z]/[0-9]+$"}]}, "a/12", "a12"),
    "e": ({"type": "array", "items": {"$ref": "#/$defs/unit"}, "maxItems": 2}, ["C", "F"], ["C", "F", "C"]),
    "f": ({"enum": ["x", 1, None]}, 1, 2),
    "g": ({"$ref": "#/$defs/tree"}, {"next": {"next": None}}, {"next": 3}),
}
MANY = {
    "type": "object",
    "properties": {key: schema for key, (schema, _, _) in KINDS.items()},
    "additionalProperties": False,
    "$defs": {
        "unit": {"type": "string", "enum": ["C", "F"]},
        "tree": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
            "additionalProperties": False,
        },
    },
}


def write(name: str, arguments: dict[str, Any]) -> str:
    """A call of the tool `many` as each model writes it."""
    call = NOW[name].replace("now", "many")
    calls = CALLS[name]
    if isinstance(calls, Tags):
        pad = "\n" if calls.lines else ""
        texts = "".join(
            f"{calls.key}{key}{calls.value}{calls.as_text if isinstance(value, str) else calls.as_json}{pad}"
            f"{value if isinstance(value, str) else _json(value)}{pad}{calls.stop}\n"
            for key, value in arguments.items()
        )
        return call.replace(f"many{calls.named}\n", f"many{calls.named}\n{texts}")
    if isinstance(calls, Escaped):
        return call.replace(
            "{}",
            re.sub('"([a-z]+)":', r"\1:", _json(arguments).replace(", ", ",").replace(": ", ":")).replace(
                '"', calls.quote
            ),
        )
    if isinstance(calls, Pythonic):
        return call.replace(
            "()", f"({', '.join(f'{key}={_json(value)}' for key, value in arguments.items())})"
        )
    return call.replace("{}", _json(arguments))


@pytest.mark.parametrize("name", CALLS)
def test_strict_arguments_of_each_format(name: str, grammars: tuple[Any, Grammars]) -> None:
    """Optional and nullable arguments, references, patterns: what is allowed is what is read, and the rest is neither."""
    format, tool = Tagged(None, CALLS[name]), Tool("many", MANY, True)
    lark = Lark(grammars[0].control)
    grammar = lark.whole(format.expression(lark, "closed", AnswerRule(None, [tool], "required")))
    for keys in ("", "a", "g", "bd", "aceg", "abcdefg"):
        arguments = {key: KINDS[key][1] for key in keys}
        text = write(name, arguments)
        assert obeys(grammars, grammar, text), text
        (call,) = format.split(text, "closed", [tool], final=True).calls
        assert json.loads(call.arguments) == arguments, text
    for key, (_, _, wrong) in KINDS.items():
        assert not obeys(grammars, grammar, write(name, {key: wrong})), key


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "schema",
    [{}, {"properties": 3}, {"properties": {"city": 3, "days": {"type": 3}, "unit": {"anyOf": 4}, "where": {"enum": 5}}},
     {"properties": {"city": {"type": [["a"], "string"]}}, "required": 3}],
)  # fmt: skip
def test_schemas_of_any_form(name: str, schema: dict[str, Any], grammars: tuple[Any, Grammars]) -> None:
    """A schema that is none does not keep calls from being read, and is an error where calls are held to it."""
    tools = [Tool("weather", schema), Tool("now", {})]
    calls = Tagged(None, CALLS[name]).split(WRITTEN[name], "free", tools, final=True).calls
    assert [call.name for call in calls] == ["weather", "now"]
    lark = Lark(grammars[0].control)
    with contextlib.suppress(RequestError):
        asked = AnswerRule(None, tools, "required")
        grammars[1].check(lark.whole(Tagged(None, CALLS[name]).expression(lark, "closed", asked)))
