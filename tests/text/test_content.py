"""Which form of content a template reads is found out, and contents are given to it in that form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mpillm.text import Tokenizer, load_tokenizer
from tests.text.asked import render_chat

from .vocabularies import write_directory

TURN = "{% for m in messages %}[{{ m.role }}]"
STRING = TURN + "{{ m.content }}{% endfor %}"
PARTS = (
    TURN + "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)
BOTH = (
    TURN + "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}({{ c['text'] }})"
    "{% endfor %}{% endif %}{% endfor %}"
)
FIRST = TURN + "{{ m['content'][0]['text'] }}{% endfor %}"
JSON = TURN + "{{ m.content | tojson }}{% endfor %}"
SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}<{{ m.content + '>' }}{% else %}"
    "{% for c in m.content %}{{ c.text | trim }};{% endfor %}{% endif %}{% endfor %}"
)
UPPER = TURN + "{{ m.content | upper | trim }}{% endfor %}"


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def load(folder: Path, template: str) -> Tokenizer:
    tokenizer = load_tokenizer(write_directory(folder, "qwen2", template))
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (STRING, "hello fox", "[user]hello fox"),
        (STRING, parts("hello fox"), "[user]hello fox"),
        (STRING, parts("hello", "fox"), "[user]hello\nfox"),
        (PARTS, "hello fox", "[user]hello fox"),
        (PARTS, parts("hello fox"), "[user]hello fox"),
        (PARTS, parts("hello ", "fox"), "[user]hello fox"),
        (PARTS, "", "[user]"),
        (PARTS, [], "[user]"),
        (BOTH, "hello fox", "[user]hello fox"),
        (BOTH, parts("hello", "fox"), "[user](hello)(fox)"),
        (FIRST, "hello fox", "[user]hello fox"),
        (FIRST, parts("hello", "fox"), "[user]hello\nfox"),
        (JSON, parts("a", "b"), '[user]"a\\nb"'),
        (UPPER, parts("a", "b"), "[user]A\nB"),
        ("always the same", parts("a", "b"), "always the same"),
    ],
)
def test_user(template: str, content: Any, text: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, template)
    assert render_chat(tokenizer, [message(content)]) == text
    assert tokenizer.decode(tokenizer.encode_chat([message(content)])) == text


def test_each_role_by_itself(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, SYSTEM)
    chat = [
        message(parts("be", "brief"), "system"),
        message("hello"),
        message(parts("x", " y "), "assistant"),
    ]
    assert render_chat(tokenizer, chat) == "<be\nbrief>hello;x;y;"


def test_users_write_no_control_tokens_in_parts(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, PARTS.replace("[{{ m.role }}]", "<|im_start|>"))
    for content in ("a<|im_end|>b", parts("a<|im_end|>b"), parts("a<|im_", "end|>b")):
        ids = tokenizer.encode_chat([message(content)])
        assert [tokenizer.token_text(id) for id in ids if tokenizer.is_control(id)] == ["<|im_start|>"]
        assert tokenizer.decode(ids) == "a<|im_end|>b"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (STRING, "[assistant]None"),  # as transformers renders it
        (TURN + "{{ m.content or '-' }}{% endfor %}", "[assistant]-"),
        (
            TURN + "{% if m.content is none %}null{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "[assistant]null",
        ),
    ],
)
def test_null_is_the_templates_business(template: str, text: str, tmp_path: Path) -> None:
    assert render_chat(load(tmp_path, template), [message(None, "assistant")]) == text
