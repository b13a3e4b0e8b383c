"""gpt-oss's chat format: reasoning and content apart in the answer, and reasoning_effort in the template."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpillm.text import load_tokenizer
from mpillm.text.harmony import MARKS
from tests.batch.test_answers import answer
from tests.job_helpers import END, WITH_TEXT, works
from tests.model.golden import model_path

TEMPLATE = (
    "{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif -%}"
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort }}<|end|>"
    "{%- for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor -%}"
    "{%- if add_generation_prompt %}<|start|>assistant{% endif -%}"
)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    folder = shutil.copytree(model_path("chat"), tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    like = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [{**like, "id": 320 + i, "content": mark} for i, mark in enumerate(MARKS)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return replace(WITH_TEXT, text=load_tokenizer(folder), vocab=324)


def ids_of(model: Any, text: str) -> list[int]:
    return model.text.encode(text, False, parse_special=True)  # type: ignore[no-any-return]


THOUGHT = "<|channel|>analysis<|message|>so it is a fox<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        (THOUGHT + "<|channel|>final<|message|>the fox", "so it is a fox", "the fox"),
        ("<|channel|>final<|message|>the fox", None, "the fox"),
        ("<|channel|>analysis<|message|>so it", "so it", ""),
        (THOUGHT + "<|channel|>fin", "so it is a fox", ""),
        (
            "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>analysis<|message|>two<|end|>"
            "<|start|>assistant<|channel|>final<|message|>three",
            "one\ntwo",
            "three",
        ),
        ("no channel", None, "no channel"),
    ],
)
def test_channels(model: Any, tmp_path: Path, text: str, thought: str | None, said: str) -> None:
    line = {"messages": [{"role": "user", "content": "the fox"}]}
    (work,) = works(tmp_path, line, model=model)
    tokens = [*ids_of(model, text), END]
    (choice,) = answer(work, [tokens], model, finish_reason="stop", stop_id=END)["choices"]
    both = {"reasoning_content": thought, "reasoning": thought}
    assert choice["message"] == {"role": "assistant", **both, "content": said}


def test_a_stop_string_ends_the_content(model: Any, tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "the fox"}], "stop": [" fox jumps"]}
    (work,) = works(tmp_path, line, model=model)
    tokens = ids_of(model, THOUGHT + "<|channel|>final<|message|>the quick fox jumps")
    (choice,) = answer(work, [tokens], model, finish_reason="stop")["choices"]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("the quick", " fox jumps")
    assert choice["message"]["reasoning_content"] == "so it is a fox"


def test_reasoning_effort_reaches_the_template(model: Any, tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "the fox"}]}
    for effort in ("medium", "high"):
        (work,) = works(
            tmp_path, line | ({} if effort == "medium" else {"reasoning_effort": effort}), model=model
        )
        prompt = (
            "<|start|>system<|message|>Reasoning: " + effort + "<|end|><|start|>user<|message|>the fox<|end|>"
        )
        assert list(work.requests[0].prompt) == ids_of(model, prompt + "<|start|>assistant")
