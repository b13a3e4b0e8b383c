"""Prompts and chats as token ids: control tokens, texts of any length, and what does not fit."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from tests.batch.test_tools import with_template
from tests.job_helpers import END, TEXT, WITH_TEXT, WITHOUT_TEXT, errors, works
from tests.text.asked import render_chat

CHAT = [{"role": "user", "content": "the quick fox"}]


def test_text_parts_and_extras_that_ask_for_nothing(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "fox"}]}]
    neutral = {
        "stream": False, "presence_penalty": 0.0, "logit_bias": {}, "tools": None, "user": "u", "best_of": 2, "n": 2,
        "response_format": {"type": "text"}, "metadata": {"a": "b"}, "prompt_logprobs": None,
    }  # fmt: skip
    made, _ = works(tmp_path, {"messages": parts}, {"prompt": "a", **neutral})
    joined = [{"role": "user", "content": "the\nfox"}]
    assert made.requests[0].prompt == tuple(TEXT.encode_chat(joined))


def test_what_nobody_asked_for_is_cut_to_the_context(tmp_path: Path) -> None:
    ids = list(range(20))
    (work,) = works(tmp_path, {"prompt": ids}, overrides=("memory.max_context=32",), model=WITHOUT_TEXT)
    assert work.requests[0].max_tokens == 12


def test_control_tokens_in_a_prompt_are_tokens_and_in_a_message_text(tmp_path: Path) -> None:
    assert WITH_TEXT.text is not None
    rendered = render_chat(WITH_TEXT.text, CHAT)
    assert "</s>" in rendered
    prompt, listed, vector, chat = works(
        tmp_path,
        {"prompt": rendered, "add_special_tokens": False},
        {"prompt": ["fox", "fox</s>"], "add_special_tokens": False},
        {"input": "fox</s>", "add_special_tokens": False},
        {"messages": [{"role": "user", "content": "fox</s>"}]},
    )
    assert prompt.requests[0].prompt == tuple(TEXT.encode_chat(CHAT))
    assert listed.requests[1].prompt == (*listed.requests[0].prompt, END)
    assert vector.requests[0].prompt == listed.requests[1].prompt
    harmless = TEXT.encode_chat([{"role": "user", "content": "fox"}])
    assert chat.requests[0].prompt.count(END) == harmless.count(END)


def test_tokens_that_the_model_has_no_embedding_for(tmp_path: Path) -> None:
    """A tokenizer with more tokens than the checkpoint: each line with one of them is an error of its own."""
    text = "the quick fox </s>"
    ids = TEXT.encode(text, parse_special=True)
    largest = max(ids)
    model = dataclasses.replace(WITH_TEXT, vocab=largest)
    chat = [{"role": "user", "content": "the quick fox"}]
    assert max(TEXT.encode_chat(chat)) >= largest
    said = errors(
        tmp_path, {"prompt": text}, {"input": ["a", text]}, {"messages": chat}, {"prompt": [1, 2, largest]},
        {"prompt": [1, largest - 1]}, model=model,
    )  # fmt: skip
    of_a_text = (
        f"has the token {TEXT.token_text(largest)!r} (id {largest}), for which the model has no embedding"
    )
    assert said[4] is None
    for error, words in zip(
        said,
        [
            f"the prompt {of_a_text}",
            f"prompt 2 of 2 {of_a_text}",
            "the prompt has the token",
            f"prompt[2]: the token id {largest} is",
        ],
        strict=False,
    ):
        assert error is not None
        assert words in error


LONG = ["the " * 300, "x" * 8_000_000, "\u20ac" * 1_000_000]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            {"context": 100, "model": 512},
            "memory.max_context is 100 tokens; shorten it or raise memory.max_context.",
        ),
        ({"context": 512, "model": 64}, "the model takes 64 tokens; shorten it."),
    ],
)
@pytest.mark.parametrize("text", LONG, ids=["few", "many", "wide"])
def test_long_texts_are_known_by_their_length(
    text: str, limits: dict[str, int], words: str, tmp_path: Path
) -> None:
    """Whatever is much longer than the context is not encoded as a whole, and the limit that counts is named."""
    model = dataclasses.replace(WITH_TEXT, max_position=limits["model"])
    found = errors(
        tmp_path, {"prompt": text}, {"prompt": ["a", text]}, {"input": text},
        {"messages": [{"role": "user", "content": text}]},
        model=model, overrides=(f"memory.max_context={limits['context']}",),
    )  # fmt: skip
    for error in found:
        assert error is not None
        assert error.endswith(words)
    assert found[1] is not None
    assert found[1].startswith("Line 2: prompt 2 of 2 has ")


def test_the_remedy_is_one_that_helps(tmp_path: Path) -> None:
    model = dataclasses.replace(WITH_TEXT, max_position=32)
    asks, fills = errors(
        tmp_path, {"prompt": [5] * 30, "max_tokens": 3}, {"prompt": [5] * 32, "temperature": 1}, model=model
    )
    assert asks is not None
    assert asks.endswith(
        "max_tokens is 3, more than the context of 32; lower max_tokens or shorten the prompt."
    )
    assert fills is not None
    assert fills.endswith("has 32 tokens and fills the context; shorten it.")


def test_null_contents_are_the_templates_business(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": None}],
        [*CHAT, {"role": "assistant", "content": None}],
        [*CHAT, {"role": "assistant"}],
    ]
    made = works(tmp_path, *({"messages": chat} for chat in chats))
    prompts = [TEXT.decode(work.requests[0].prompt, skip_special=False) for work in made]
    assert ["None" in prompt for prompt in prompts] == [True, True, False]


def test_a_role_is_one_of_openais_or_of_the_template(tmp_path: Path) -> None:
    roles = ("system", "developer", "user", "assistant", "tool", "function", "critic", "User", "")
    lines = [{"messages": [{"role": role, "content": "the fox"}]} for role in roles]
    lines.append({"messages": lines[6]["messages"], "choices": ["a", "b"]})
    found = errors(tmp_path, *lines)
    assert found[:6] == [None] * 6
    for error, role in zip(found[6:], ("critic", "User", "", "critic"), strict=True):
        assert f"messages[0] has the role {role!r}, which the chat template does not name" in str(error)
    template = "{% for m in messages %}{% if m.role == 'critic' %}c{% endif %}{{ m.content }}{% endfor %}"
    model = with_template(tmp_path / "critic", template)
    assert [error is None for error in errors(tmp_path, *lines[6:], model=model)] == [
        True,
        False,
        False,
        True,
    ]


def test_long_prompts_are_cut(tmp_path: Path) -> None:
    text, context = "the quick brown fox jumps over the lazy dog " * 40, 256
    ids = TEXT.encode(text, False)
    head, tail = TEXT.around
    capacity = 20 - len(head) - len(tail)
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 9}
    asked = [
        {"prompt": text, "truncate_prompt_tokens": 20},
        {"prompt": text, "truncate_prompt_tokens": 20, "add_special_tokens": False},
        {"prompt": [ids, "fox"], "truncate_prompt_tokens": 20},
        {"prompt": text, "truncate_prompt_tokens": -1, "max_tokens": 56},
        {**chat, "truncate_prompt_tokens": 20},
        {"input": text, "truncate_prompt_tokens": 20},
        {"input": text, "truncate_prompt_tokens": -1},
    ]
    made = works(tmp_path, *asked, overrides=(f"memory.max_context={context}",))
    found = [list(work.requests[0].prompt) for work in made]
    assert found[0] == [*head, *ids[-capacity:], *tail]
    assert found[1] == found[2] == ids[-20:]
    assert list(made[2].requests[1].prompt) == TEXT.encode("fox")
    assert len(found[3]) == context - 56
    (whole,) = works(tmp_path, chat, model=replace(WITH_TEXT, max_position=4096))
    assert found[4] == list(whole.requests[0].prompt)[-20:]
    assert found[5] == [*head, *ids[:capacity], *tail]
    assert len(found[6]) == context
    wrong = [{"prompt": "a", "truncate_prompt_tokens": 0}, {"prompt": "a", "truncate_prompt_tokens": -2}]
    assert errors(tmp_path, *wrong) == [
        "Line 1: truncate_prompt_tokens must be -1, or 1 or more.",
        "Line 2: truncate_prompt_tokens: expected a whole number >= -1.",
    ]
