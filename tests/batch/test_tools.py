"""Chats with tools and with reasoning: what the template sees, what the model is held to, and what the answer shows."""

# ruff: noqa: E501 - tables of whole sentences

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from mpillm.api.answers import Generation, answer_of
from mpillm.batch.streaming import ChatStream
from mpillm.batch.work import Work
from mpillm.store.records import Choice, Result
from mpillm.text import constrain, load_tokenizer
from tests.batch.test_answers import answer
from tests.job_helpers import CHAT, END, WITH_TEXT, errors, works
from tests.model.engine_harness import run_engine

# Hermes's format, as Qwen3 has it. Strings of tool calls and of tools are the template's alone.
TEMPLATE = """{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>{"name": ..., "arguments": ...}</tool_call></s>{% endif -%}
{%- for m in messages %}<|{{ m.role }}|>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif -%}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor -%}
{{- '</s>' }}{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined %}{{ '<think>' if enable_thinking else '<think>\\n\\n</think>' }}{% endif %}{% endif -%}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "how it is",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Rome", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {
    "type": "function",
    "function": {
        "name": "now",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
ASK = [{"role": "user", "content": "the fox"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'


def with_template(folder: Path, template: str) -> Any:
    shutil.copytree(CHAT, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return replace(WITH_TEXT, text=load_tokenizer(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return with_template(tmp_path_factory.mktemp("tools") / "model", TEMPLATE)


def said(work: Work, text: str, model: Any, **more: Any) -> dict[str, Any]:
    """The choice of an answer with this text, which came bit by bit as it comes in a stream, and as clients read it."""
    ids = model.text.encode(text, False)
    ending = {"finish_reason": "stop", "stop_id": END} | more
    body = answer(work, [[*ids, END]], model, **ending)
    (choice,) = body["choices"]
    ChatCompletion.model_validate(body)
    (request,) = work.requests
    stream = ChatStream(work.endpoint, request, work.spec, model)  # type: ignore[arg-type]
    deltas = [*(stream.push(token) for token in ids), stream.rest(choice["message"])]
    for delta in deltas:
        ChoiceDelta.model_validate(delta)
    for key in ("content", "reasoning_content", "reasoning"):
        assert "".join(delta.get(key, "") for delta in deltas) == (choice["message"].get(key) or "")
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call.pop("index") for call in calls] == list(range(len(calls)))
    assert calls == choice["message"].get("tool_calls", [])
    assert len([delta for delta in deltas if delta]) > (5 if "Let me see" in text else 0), "bit by bit"
    return choice  # type: ignore[no-any-return]


def test_calls_of_an_answer(model: Any, tmp_path: Path) -> None:
    bodies = [{"messages": ASK, "tools": [WEATHER, NOW], "custom_id": name} for name in "ab"]
    first, second = works(tmp_path, *bodies, model=model)
    text = (
        f"<think>\nso\n</think>\n\nLet me see.\n{CALL}\n"
        + '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )
    choice = said(first, text, model)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("so", "Let me see.")
    functions = [call["function"] for call in message["tool_calls"]]
    assert [function["name"] for function in functions] == ["weather", "now"]
    assert [json.loads(function["arguments"]) for function in functions] == [{"city": "Rome", "days": 3}, {}]
    body = {"choices": [choice], "usage": {"completion_tokens": 9}}
    line = json.dumps({"response": {"body": body}}).encode()
    typed = answer_of(0, Result("a", b"", 200, line, [], [Choice("stop", {}, 0.0, 0.0)]))
    assert isinstance(typed, Generation)
    (completion,) = typed.completions
    assert (completion.text, completion.reasoning, completion.finish_reason) == (
        "Let me see.",
        "so",
        "tool_calls",
    )
    assert list(completion.tool_calls) == message["tool_calls"]
    ids = [
        call["id"] for found in (choice, said(second, text, model)) for call in found["message"]["tool_calls"]
    ]
    assert len(set(ids)) == 4
    assert said(first, text, model) == choice
    (hidden,) = works(tmp_path, {**bodies[0], "include_reasoning": False}, model=model)
    assert said(hidden, text, model)["message"] == {
        k: v for k, v in message.items() if k not in ("reasoning_content", "reasoning")
    }
    assert said(first, CALL, model)["message"] == {"role": "assistant", "reasoning_content": None, "reasoning": None,
                                                   "content": None, "tool_calls": [{**message["tool_calls"][0]}]}  # fmt: skip
    cut = said(first, CALL[:40], model, finish_reason="length", stop_id=None)
    assert (cut["finish_reason"], "tool_calls" in cut["message"]) == ("length", False)


def test_when_calls_are_no_calls(model: Any, tmp_path: Path) -> None:
    none, plain, one, shown, off = works(
        tmp_path,
        {"messages": ASK, "tools": [WEATHER], "tool_choice": "none"},
        {"messages": ASK, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": ASK, "tools": [WEATHER], "parallel_tool_calls": False},
        {"messages": ASK, "tools": [WEATHER], "skip_special_tokens": False},
        {"messages": ASK, "chat_template_kwargs": {"enable_thinking": True}},
        model=model,
    )
    assert said(none, CALL, model)["message"]["content"] == CALL
    assert "weather" not in model.text.decode(none.requests[0].prompt)
    assert said(plain, CALL, model)["message"] == {
        "role": "assistant",
        "reasoning_content": None,
        "reasoning": None,
        "content": CALL,
    }
    assert len(said(one, CALL + CALL, model)["message"]["tool_calls"]) == 1
    whole = "<think>so</think>" + CALL
    assert (
        answer(shown, [model.text.encode(whole, False)], model)["choices"][0]["message"]["content"] == whole
    )
    assert said(off, "so</think>yes it is", model)["message"] == {
        "role": "assistant",
        "reasoning_content": "so",
        "reasoning": "so",
        "content": "yes it is",
    }


def test_the_job_says_how_answers_are_divided(model: Any, tmp_path: Path) -> None:
    body = {"messages": ASK, "tools": [WEATHER]}
    (other,) = works(
        tmp_path,
        body,
        model=model,
        overrides=("chat.reasoning=['[a]', '[b]']", "chat.tool_calls='llama3_json'"),
    )
    choice = said(other, '[a]so[b]{"name": "weather", "parameters": {"city": "Oslo", "days": 1}}', model)
    assert choice["message"]["reasoning_content"] == "so"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    (none,) = works(
        tmp_path, body, model=model, overrides=("chat.reasoning='none'", "chat.tool_calls='none'")
    )
    assert said(none, f"<think>so</think>{CALL}", model)["message"] == {
        "role": "assistant",
        "content": f"<think>so</think>{CALL}",
    }


def test_what_the_template_sees(model: Any, tmp_path: Path) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 3}'},
    }
    chat = [
        *ASK,
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "so"},
        {"role": "tool", "tool_call_id": "call_1", "content": "hot"},
    ]
    (work,) = works(tmp_path, {"messages": chat, "tools": [WEATHER]}, model=model)
    text = model.text.decode(work.requests[0].prompt, skip_special=False)
    assert json.dumps(WEATHER) in text
    assert (
        '<think>so</think><tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 3}}</tool_call>'
        in text
    )
    assert text.endswith("<|tool|>hot</s><|assistant|>")
    strings = with_template(
        tmp_path / "strings",
        TEMPLATE.replace("{{ call.function.arguments | tojson }}", "{{ '' + call.function.arguments }}"),
    )
    (other,) = works(tmp_path, {"messages": chat, "tools": [WEATHER]}, model=strings)
    assert other.requests[0].prompt == work.requests[0].prompt


HELD: list[tuple[dict[str, Any], set[str]]] = [
    ({"tools": [WEATHER, NOW], "tool_choice": "required"}, {"weather", "now"}),
    ({"tools": [WEATHER, NOW], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, {"weather"}),
    ({"tools": [WEATHER, NOW], "tool_choice": "required", "parallel_tool_calls": False}, {"weather", "now"}),
    ({"tools": [STRICT], "guided_choice": ["3", "4"]}, {"weather", ""}),
]  # fmt: skip


def test_answers_are_held_to_the_tools(tmp_path: Path) -> None:
    """By the real engine, whose model is a random one."""
    model = with_template(
        tmp_path / "model", TEMPLATE.replace("{{ tool | tojson }}", "{{ tool.function.name }}")
    )
    lines = [{"messages": ASK, "max_tokens": 200, "temperature": 2.0, "n": 8, "seed": 0, **body,
              "chat_template_kwargs": {"enable_thinking": False}} for body, _ in HELD]  # fmt: skip
    asked = works(tmp_path, *lines, model=model)
    completions = run_engine(CHAT, [request for work in asked for request in work.requests])
    complete = several = 0
    for work, (body, names), at in zip(asked, HELD, range(0, 32, 8), strict=True):
        found = work.endpoint.response(work, completions[at : at + 8], model)
        for choice in msgspec.json.decode(msgspec.json.encode(found["choices"])):
            calls = choice["message"].get("tool_calls") or []
            if choice["finish_reason"] == "length":
                continue
            complete += 1
            several += len(calls) > 1
            assert len({call["id"] for call in calls}) == len(calls)
            assert {call["function"]["name"] for call in calls} <= names
            assert calls or "" in names
            assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
            if not calls:
                json.loads(choice["message"]["content"])
            if body.get("parallel_tool_calls") is False:
                assert len(calls) == 1
            for call in calls:
                arguments = json.loads(call["function"]["arguments"])
                assert arguments == {} or (
                    arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
                )
    assert complete >= 16
    assert several >= 1


BAD = [
    ({"tools": [{"type": "function"}]}, "tools[0]: object missing required field function"),
    ({"tools": [WEATHER, {"type": "web_search", "function": {"name": "a"}}]}, "tools[1].type: invalid enum value 'web_search'"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1]: there is another tool 'weather'"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice names 'x', which is not among the tools"),
    ({"tool_choice": "required"}, "tool_choice is 'required' and there are no tools"),
    ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice: "),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "obj"}}}]}, "Invalid type: obj"),
    ({"tools": [STRICT], "guided_json": {"type": "obj"}}, "guided_json: it cannot be enforced"),
    ({"tools": [WEATHER], "tool_choice": "required", "guided_json": {"type": "obj"}}, "guided_json: it cannot be enforced"),
    ({"tools": [WEATHER], "tool_choice": "required", "min_tokens": 3}, "min_tokens and a grammar"),
    ({"messages": [*ASK, {"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[1].tool_calls[0] needs a function with a name"),
    ({"messages": [*ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "messages[1].tool_calls[0].function.arguments is not JSON"),
    ({"messages": [*ASK, {"role": "assistant", "tool_calls": "f"}]}, "messages[1].tool_calls must be a list"),
]  # fmt: skip


def test_a_schema_beside_tools_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the grammar of the format: compiling takes up to a second."""
    compiled: list[str] = []
    compile = constrain.Grammars._compile

    def counted(self: constrain.Grammars, grammar: str) -> Any:
        compiled.append(grammar)
        return compile(self, grammar)

    monkeypatch.setattr(constrain.Grammars, "_compile", counted)
    schema = {"type": "object", "properties": {"of this test alone": {"type": "integer"}}}
    model = with_template(tmp_path / "model", TEMPLATE)
    works(tmp_path, {"messages": ASK, "tools": [STRICT], "guided_json": schema}, model=model)
    assert len(compiled) == 1


def test_mistakes(model: Any, tmp_path: Path) -> None:
    found = errors(
        tmp_path,
        *({"messages": ASK, **body} for body, _ in BAD),
        {"messages": ASK, "tools": [], "tool_choice": "none"},
        model=model,
    )
    assert found.pop() is None
    for error, (_, words) in zip(found, BAD, strict=True):
        assert error is not None
        assert words in error
    assert errors(tmp_path, {"messages": ASK, "tools": [WEATHER]}) == [
        "Line 1: the model's chat template does not use tools."
    ]
    no_format = ("chat.tool_calls='none'",)
    body = {"messages": ASK, "tools": [WEATHER], "tool_choice": "required"}
    assert "format of tool calls is not known" in str(
        errors(tmp_path, body, model=model, overrides=no_format)
    )
