"""Chat templates in the styles of real models, and conversations for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpillm.text import Tokenizer

TEMPLATES = {
    path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
STYLE = {
    "chatml": "qwen2",
    "llama2": "llama2",
    "llama3": "llama3",
    "loops": "llama2new",
    "mistral": "mistral",
    "qwen3": "qwen2",
}

Messages = list[dict[str, Any]]
Make = Callable[..., Tokenizer]  # the fixture `make`: a tokenizer with this chat template


def named(make: Make, name: str) -> Tokenizer:
    return make(TEMPLATES[name], STYLE[name])


def user(*contents: str, role: str = "user") -> Messages:
    return [{"role": role, "content": content} for content in contents]


def _chat(*turns: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in turns]


_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "caf\u00e9 <b>&", "parameters": {"x": 1.5}},
}
CONVERSATIONS: list[tuple[Messages, dict[str, Any]]] = [
    (_chat(("user", "Hello")), {}),
    (_chat(("user", "Hello")), {"add_generation_prompt": False}),
    (_chat(("user", "")), {}),
    (
        _chat(
            ("system", "Be brief."),
            ("user", "What is 2+2? "),
            ("assistant", " 4. "),
            ("user", "\n And 3+3?\n"),
        ),
        {},
    ),
    (_chat(("system", ""), ("user", "x"), ("assistant", ""), ("user", "y")), {}),
    (_chat(("user", "a < b and c > d | e [f] <tag> </tag> <|x"), ("assistant", "<b>[1]</b>")), {}),
    (_chat(("user", "user"), ("assistant", "im_end"), ("user", "|")), {}),
    (_chat(("user", "q"), ("assistant", "<think>\nhm, 1 < 2\n</think>\n\nyes"), ("user", "r")), {}),
    (_chat(("user", "q"), ("assistant", "<think>\nlast\n</think>\n\nyes")), {"add_generation_prompt": False}),
    (_chat(("user", "why?")), {"enable_thinking": False}),
    ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "because"}], {}),
    (
        [
            *_chat(("user", "w")),
            {"role": "assistant", "content": "v", "reasoning_content": "r"},
            *_chat(("user", "u")),
        ],
        {},
    ),
    (_chat(("user", "weather?")), {"tools": [_TOOL]}),
    (
        _chat(
            ("user", "t"),
            ("assistant", "call"),
            ("tool", "sunny <tool_response>"),
            ("tool", "{}"),
            ("user", "ok"),
        ),
        {},
    ),
    (_chat(("user", "<tool_response>x</tool_response>"), ("assistant", "y"), ("user", "z")), {}),
    (
        _chat(
            (
                "user",
                "\u4f60\u597d \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0645\u0631\u062d\u0628\u0627\u2028x\u00a0",
            )
        ),
        {},
    ),
    (_chat(("user", "a" * 500 + "\n" * 40 + " " * 40)), {}),
    (_chat(("user", "skip me"), ("assistant", "one|two"), ("user", "'\"\\ \t{{ messages }} {% raw %}")), {}),
    (_chat(("assistant", "I begin"), ("user", "no")), {}),
    (_chat(*[("user", f"{n}") for n in range(9)]), {}),
    ([], {}),
]
