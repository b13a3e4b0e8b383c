"""What templates of a job ask of rows of any kind."""

# ruff: noqa: E501 - a table of whole lines

from __future__ import annotations

from typing import Any

import pytest

from mpillm.batch.template import Template

ROWS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # the template, a row, and what is asked of it
    ({"prompt": "{meta.title}: {meta.a.b}", "n": 2}, {"meta": {"title": "T", "a": {"b": 1.5}}}, {"prompt": "T: 1.5", "n": 2}),
    ({"prompt": "{a.b}"}, {"a.b": "own", "a": {"b": "inner"}}, {"prompt": "own"}),
    ({"prompt": "{text}", "max_tokens": "{n}", "temperature": "{t}", "echo": "{e}", "seed": "{none}"},
     {"text": "5", "n": "12", "t": "0.5", "e": "true", "none": ""},
     {"prompt": "5", "max_tokens": 12, "temperature": 0.5, "echo": True, "seed": None}),
    ({"messages": "{chat}"}, {"chat": '[{"role": "user", "content": "hi"}]'}, {"messages": [{"role": "user", "content": "hi"}]}),
    ({"query": "{year}", "documents": ["{a}", "No {b}"]}, {"year": 1984, "a": 3, "b": 4}, {"query": "1984", "documents": ["3", "No 4"]}),
    ({"query": "q", "documents": "{list}"}, {"list": '["a", "b"]'}, {"query": "q", "documents": ["a", "b"]}),
    ({"prompt": "{text}", "echo": "{a}", "ignore_eos": "{b}"}, {"text": "True", "a": "True", "b": "FALSE"}, {"prompt": "True", "echo": True, "ignore_eos": False}),
    ({"prompt": "{p}", "choices": "{c}"}, {"p": "true", "c": ["x", "y"]}, {"prompt": "true", "choices": ["x", "y"]}),
    ({"prompt": "{p}", "choices": ["{one}", "{two}"]}, {"p": "[1]", "one": 1, "two": True}, {"prompt": "[1]", "choices": ["1", "true"]}),
    ({"prompt": "{p}", "stop": "{s}"}, {"p": "a", "s": "7"}, {"prompt": "a", "stop": "7"}),
    ({"prompt": "{p}", "response_format": "{f}"}, {"p": "a", "f": '{"type": "json_object"}'}, {"prompt": "a", "response_format": {"type": "json_object"}}),
    ({"prompt": "{\u4f60 \u597d}"}, {"\u4f60 \u597d": "\N{SNOWMAN}"}, {"prompt": "\N{SNOWMAN}"}),
]  # fmt: skip


@pytest.mark.parametrize(("template", "row", "asked"), ROWS)
def test_what_is_asked_of_a_row(template: dict[str, Any], row: dict[str, Any], asked: dict[str, Any]) -> None:
    made = Template(template)
    assert made.line(row) == asked
    assert made.missing(list(row)) == []
    assert made.missing(["other"]) == sorted(made.columns)
