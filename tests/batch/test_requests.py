"""The input: what is taken, and one sentence for every line that is not."""

# ruff: noqa: E501 - a table of whole sentences

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.batch import requests
from mpillm.batch.bodies import decode_line
from mpillm.batch.endpoints import ChatCompletionsEndpoint, CompletionsEndpoint, EmbeddingsEndpoint
from mpillm.errors import JobError, RequestError
from tests.job_helpers import END, TEXT, WITH_TEXT, WITHOUT_TEXT, checked, errors, job, works

CHAT = [{"role": "user", "content": "the quick fox"}]


def line(
    body: Any, url: str = "/v1/completions", custom_id: str | None = None, **more: Any
) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def test_batch_lines_and_bare_lines(tmp_path: Path) -> None:
    made = works(
        tmp_path,
        line({"model": "m", "messages": CHAT}, "/v1/chat/completions", "chat"),
        line({"prompt": "the fox"}, custom_id="text"),
        line({"input": "the fox"}, "/v1/embeddings", "vector"),
        {"prompt": "the fox"},
        {"messages": CHAT, "custom_id": "mine"},
        {"input": ["the", "fox"]},
    )
    assert [work.custom_id for work in made] == ["chat", "text", "vector", "request-4", "mine", "request-6"]
    kinds = [
        ChatCompletionsEndpoint,
        CompletionsEndpoint,
        EmbeddingsEndpoint,
        CompletionsEndpoint,
        ChatCompletionsEndpoint,
        EmbeddingsEndpoint,
    ]
    assert [type(work.endpoint) for work in made] == kinds
    assert made[0].requests[0].prompt == tuple(TEXT.encode_chat(CHAT))
    assert made[1].requests[0].prompt == tuple(TEXT.encode("the fox", True))
    assert [request.kind for request in made[5].requests] == ["embed", "embed"]
    assert made[0].requests[0].stop_ids == {END}


def test_defaults_come_from_the_job_and_lines_win(tmp_path: Path) -> None:
    overrides = ("sampling.temperature=0.5", "sampling.seed=9", "sampling.max_tokens=7", "sampling.top_k=-1",
                 "sampling.stop=['x', 'y']", "embeddings.pooling=last")  # fmt: skip
    own = {"prompt": "a", "temperature": 0, "seed": -3, "max_tokens": 5, "top_k": 4, "top_p": 0.5, "min_p": 0.1,
           "repetition_penalty": 1.2, "stop": "z", "ignore_eos": True, "stop_token_ids": [5], "n": None}  # fmt: skip
    plain, said, vector = works(tmp_path, {"prompt": "a"}, own, {"input": "a"}, overrides=overrides)
    first, second = plain.requests[0], said.requests[0]
    assert (first.temperature, first.seed, first.max_tokens, first.top_k) == (0.5, 9, 7, 0)
    assert [asked.endpoint.stops(asked.spec) for asked in (plain, said)] == [("x", "y"), ("z",)]
    assert (second.temperature, second.seed, second.max_tokens, second.top_k) == (0.0, -3, 5, 4)
    assert (second.top_p, second.min_p, second.repetition_penalty, second.stop_ids) == (0.5, 0.1, 1.2, {5})
    assert first.watch is not None
    assert vector.requests[0].pooling == "last"


def test_every_prompt_makes_its_own_choices(tmp_path: Path) -> None:
    draw = random.Random(5)
    prompts = [[draw.randrange(100) for _ in range(draw.randrange(1, 9))] for _ in range(3)]
    (work,) = works(tmp_path, {"prompt": prompts, "n": 2}, model=WITHOUT_TEXT)
    assert [list(request.prompt) for request in work.requests] == [p for p in prompts for _ in range(2)]
    assert [request.choice for request in work.requests] == list(range(6))
    assert {request.id for request in work.requests} == {"request-1"}
    assert work.prompt_tokens == sum(map(len, prompts))
    (one,) = works(tmp_path, {"prompt": prompts[0]}, model=WITHOUT_TEXT)
    assert [list(request.prompt) for request in one.requests] == [prompts[0]]
    (two,) = works(tmp_path, {"prompt": ["the", "fox"]})
    assert [list(request.prompt) for request in two.requests] == [TEXT.encode("the"), TEXT.encode("fox")]


def test_scoring_and_logprobs(tmp_path: Path) -> None:
    score, echo, chat = works(
        tmp_path,
        {"prompt": "the fox", "max_tokens": 0, "echo": True, "logprobs": 2},
        {"prompt": "the fox", "echo": True},
        {"messages": CHAT, "logprobs": True, "top_logprobs": 20, "max_completion_tokens": 3},
    )
    assert (score.requests[0].max_tokens, score.requests[0].logprobs, score.requests[0].prompt_logprobs) == (
        0,
        2,
        2,
    )
    assert (echo.requests[0].prompt_logprobs, echo.endpoint.prompt) == (None, "the fox")
    assert (chat.requests[0].logprobs, chat.requests[0].max_tokens) == (20, 3)


BAD = [
    (b"?", "the line is not JSON: invalid character (byte 0)"),
    (b'{"prompt": "a"', "the line is not JSON: input data was truncated"),
    (b'{"prompt": "a", "seed": NaN}', "the line is not JSON: NaN is not a JSON value (byte 24); write null, true, false or a number"),
    (b'{"prompt": "a", "seed": -Infinity}', "the line is not JSON: Infinity is not a JSON value (byte 25); write null, true, false or a number"),
    (b'{"prompt": None}', "the line is not JSON: None is not a JSON value (byte 11); write null, true, false or a number"),
    (b'{"prompt": "a"} x', "the line is not JSON: trailing characters (byte 17)"),
    (b'{"prompt": "\xff"}', "the line is not UTF-8 text (byte 13)"),
    (b'\xe4{"prompt": "a"}', "the line is not UTF-8 text (byte 1)"),
    (b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}", "the line is nested too deeply"),
    (b"[1]", 'the line is not a JSON object such as {"prompt": "..."}'),
    ({}, "the line needs one of messages, prompt, input, choices, text_1 or query, or a url and a body"),
    ({"n": 1, "text": "a"}, "the line needs one of messages, prompt, input, choices, text_1 or query, or a url and a body; to make a prompt of text, add --set 'prompt={text}'"),
    ({"prompt": "a", "messages": CHAT}, "the line needs one of messages, prompt, input, choices, text_1 or query, or a url and a body"),
    ({"prompt": None, "seed": 1}, "prompt: expected a string or a list, got null"),
    ({"custom_id": 3, "prompt": "a"}, "custom_id must be a non-empty string"),
    ({"custom_id": "", "prompt": "a"}, "custom_id must be a non-empty string"),
    (line({"prompt": "a"}, "/v1/images"), "the url '/v1/images' is unknown; there are /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/multiple_choice, /v1/score, /v1/rerank, /v1/classify"),
    (line({"prompt": "a"}, "/v1/messages"), "the url '/v1/messages' is unknown; use /v1/chat/completions"),
    (line({"prompt": "a"}, "https://api.openai.com/v1/completions"), "the url 'https://api.openai.com/v1/completions' is unknown; use /v1/completions"),
    (line({"prompt": "a"}, [1]), "the url [1] is unknown; there are /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/multiple_choice, /v1/score, /v1/rerank, /v1/classify"),
    ({"custom_id": "a", "params": {"messages": CHAT}}, "the line needs one of messages, prompt, input, choices, text_1 or query, or a url and a body; Anthropic's params are the body here, with the url /v1/chat/completions"),
    ({"custom_id": "none", "body": {}}, "there is no url; there are /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/multiple_choice, /v1/score, /v1/rerank, /v1/classify"),
    (line({"prompt": "a"}) | {"method": "GET"}, "the method must be 'POST', not 'GET'"),
    (line([1]), "the body must be a JSON object"),
    (line({"prompt": "a"}, extra=1), "the key 'extra' is unknown; the keys of a line are custom_id, method, url, body"),
    (line({}), "the key 'prompt' is missing"),
    ({"prompt": "a", "strem": True}, "the key 'strem' is unknown (did you mean 'stream'?)"),
    ({"prompt": "a", "max_new_tokens": 3}, "the key 'max_new_tokens' is unknown; use max_tokens"),
    ({"prompt": "a", "stream": True}, "stream true is not supported; a batch returns whole answers"),
    ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty: expected a number <= 2.0"),
    ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty: expected a number >= -2.0"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias: 'x' is not a token id"),
    ({"prompt": "a", "logit_bias": {"100000": 1}}, "logit_bias: the token id 100000 is not in the vocabulary (0 to {last})"),
    ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids: expected a list of length >= 1"),
    ({"prompt": "a", "allowed_token_ids": [-7]}, "allowed_token_ids: the token id -7 is not in the vocabulary (0 to {last})"),
    ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, more than the 8 tokens that may follow the prompt"),
    ({"prompt": "a", "best_of": 2, "n": 3}, "best_of is 2 and n is 3; best_of must not be smaller than n"),
    ({"messages": CHAT, "best_of": 2}, "best_of 2 is not supported; use n for several answers"),
    ({"messages": CHAT, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message and add_generation_prompt cannot be used together"),
    ({"prompt": "a", "suffix": "b"}, "suffix 'b' is not supported"),
    ({"messages": CHAT, "tools": [{}]}, "tools[0]: object missing required field function"),
    ({"messages": CHAT, "ecoh": True}, "the key 'ecoh' is unknown (did you mean 'echo'?)"),
    ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    ({"messages": CHAT, "logprobs": 2}, "logprobs: expected true or false or null, got a whole number"),
    ({"messages": CHAT, "max_tokens": 0}, "max_tokens: 0 generates nothing; to score a text, use /v1/completions with echo: true"),
    ({"messages": []}, "messages: expected a list of length >= 1"),
    ({"messages": [{"content": "a"}]}, "messages[0] needs a role such as 'user'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content must be a string or a list of text parts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0] is of type 'image_url'; only text is supported"),
    ({"messages": [{"role": "user", "content": ["a", {"type": "text"}]}]}, "messages[0].content[1].text must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text must be a string"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0] needs a function with a name"),
    ({"prompt": "a", "temperature": -1}, "temperature: expected a number >= 0.0"),
    ({"prompt": "a", "logprobs": 1001}, "logprobs: expected a whole number <= 1000"),
    ({"prompt": "a", "stop": [""]}, "stop[0]: expected a string of length >= 1"),
    ({"prompt": "a", "n": 0}, "n: expected a whole number >= 1"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens: 0 generates nothing; add echo: true to score the prompt"),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids: the token id -1 is not in the vocabulary (0 to {last})"),
    ({"prompt": "a", "choices": []}, "choices: expected a list of length >= 1"),
    ({"choices": ["a"]}, "the line needs either prompt or messages with its choices"),
    ({"prompt": "a", "choices": [""]}, "choices[0]: expected a string of length >= 1"),
    ({"prompt": "a", "choices": [[100000]]}, "choices[0]: the token id 100000 is not in the vocabulary (0 to {last})"),
    ({"prompt": [1] * 39, "choices": [[1], [1, 2]]}, "the prompt with choices[1] has 41 tokens and memory.max_context is 40 tokens; shorten it or raise memory.max_context"),
    ({"prompt": [1, 100000]}, "prompt[1]: the token id 100000 is not in the vocabulary (0 to {last})"),
    ({"prompt": [[1], [-1]]}, "prompt[1][0]: the token id -1 is not in the vocabulary (0 to {last})"),
    ({"prompt": ["a", 1]}, "prompt must be a string, a list of strings, a list of token ids, or a list of such lists"),
    ({"prompt": [True]}, "prompt must be a string, a list of strings, a list of token ids, or a list of such lists"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": ["a", ""]}, "prompt 2 of 2 has no tokens"),
    ({"input": ["a"], "dimensions": 0}, "dimensions: expected a whole number >= 1"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format: expected one of 'float', 'base64', not 'hex'"),
    ({"prompt": [1] * 41}, "the prompt has 41 tokens and memory.max_context is 40 tokens; shorten it or raise memory.max_context"),
    ({"input": [[1], [1] * 41]}, "prompt 2 of 2 has 41 tokens and memory.max_context is 40 tokens; shorten it or raise memory.max_context"),
    ({"prompt": [1] * 30, "max_tokens": 11}, "the prompt has 30 tokens and max_tokens is 11, more than the context of 40; lower max_tokens or shorten the prompt or raise memory.max_context"),
    ({"prompt": [1] * 40}, "the prompt has 40 tokens and fills the context; shorten it or raise memory.max_context"),
]  # fmt: skip


def test_each_bad_line_has_its_sentence_and_costs_no_other(tmp_path: Path) -> None:
    lines = []
    for content, _ in BAD:
        lines += [content, {"prompt": "the fox"}]
    batch = checked(tmp_path, lines, "memory.max_context=40")
    assert [found.error for found in list(batch.lines)[1::2]] == [None] * len(BAD)
    said = [found.error for found in list(batch.lines)[::2]]
    last = str(WITH_TEXT.vocab - 1)
    expected = [f"Line {2 * n + 1}: {words.replace('{last}', last)}." for n, (_, words) in enumerate(BAD)]
    for found, wanted in zip(said, expected, strict=True):
        assert found == wanted
    assert len(list(batch.works())) == len(BAD)
    assert len(list(batch.errors)) == batch.bad == len(BAD)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    assert errors(
        tmp_path,
        {"prompt": "a"},
        {"messages": CHAT},
        {"prompt": [1], "stop": "x"},
        {"prompt": [1, 2]},
        model=WITHOUT_TEXT,
    ) == [
        "Line 1: prompt is a string and the model has no tokenizer; give token ids, or put its "
        "tokenizer.json beside it.",
        "Line 2: the model has no tokenizer; give token ids as the prompt of /v1/completions, or put its "
        "tokenizer.json beside it.",
        "Line 3: stop strings need a tokenizer, and the model has none; use stop_token_ids.",
        None,
    ]


def test_what_the_model_or_the_kv_cache_cannot_take(tmp_path: Path) -> None:
    small = requests.Model(vocab=100, max_position=8, kv_tokens=6, kv_token_bytes=1000)
    assert errors(
        tmp_path, {"prompt": [1] * 9}, {"prompt": [1] * 7}, {"prompt": [1] * 4, "max_tokens": 3},
        {"prompt": [1] * 4, "max_tokens": 4}, model=small,
    ) == [
        "Line 1: the prompt has 9 tokens and the model takes 8 tokens; shorten it.",
        "Line 2: it needs 7 tokens x 1000 bytes = 7000 bytes of KV cache, but memory.kv = 1GiB holds 6 tokens; "
        "raise memory.kv.",
        None,
        "Line 4: it needs 7 tokens x 1000 bytes = 7000 bytes of KV cache, but memory.kv = 1GiB holds 6 tokens; "
        "raise memory.kv.",
    ]  # fmt: skip


def test_names_are_given_once(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "custom_id": "x"}, {"prompt": "b", "custom_id": "x"}, b"?",
             {"prompt": "c", "custom_id": "request-3"}, {"prompt": "d", "custom_id": "request-2"}]  # fmt: skip
    batch = checked(tmp_path, lines)
    assert [found.custom_id for found in batch.lines] == [
        "x",
        "request-2-2",
        "request-3-2",
        "request-3",
        "request-2",
    ]
    assert batch.lines[1].error == "Line 2: the custom_id 'x' is already that of line 1."
    assert [work.custom_id for work in batch.works({"x", "request-3"})] == ["request-2"]


def test_line_ends_marks_and_blank_lines(tmp_path: Path) -> None:
    for raw in [
        b'\xef\xbb\xbf{"prompt":"a"}\r\n\r\n  \n{"prompt":"b"}',
        b'{"prompt":"a"}\n\n\n{"prompt":"b"}\n\n',
    ]:
        made = job(tmp_path)
        made.input_path.write_bytes(raw)
        batch = requests.check(made.input_path, made, WITH_TEXT)
        assert [(found.number, found.custom_id, found.error) for found in batch.lines] == [
            (1, "request-1", None), (4, "request-4", None),
        ]  # fmt: skip
        assert [len(work.prompts) for work in batch.works()] == [1, 1]


def test_a_line_longer_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_LINE", 2**20)
    long = b'{"prompt": "' + b"a" * (3 * 2**20) + b'"}'
    batch = checked(tmp_path, [{"prompt": "a"}, long, {"prompt": "b"}])
    assert [found.error for found in batch.lines] == [None, "Line 2: the line is longer than 1 MiB.", None]
    assert len(list(batch.works())) == 2


LINE = '{"prompt": "a", "max_tokens": 1}'


def test_one_line_that_looks_like_another_format_costs_no_other(tmp_path: Path) -> None:
    batch = checked(
        tmp_path, [b"[1, 2]", b"{", b'{"prompt": "a"}\r', b'\xef\xbb\xbf{"prompt": "b"}', b"\x1f\x8b\x08"]
    )
    assert [line.error is None for line in batch.lines] == [False, False, True, False, False]
    assert batch.lines[3].error is not None
    assert "byte order mark" in batch.lines[3].error


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        (b'{"custom_id": "x", "custom_id": "x", "prompt": "b"}', "custom_id"),
        (
            b'{"url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1, "max_tokens": 2}}',
            "max_tokens",
        ),
        (b'{"messages": [{"role": "user", "content": "a", "cont\\u0065nt": "b"}]}', "content"),
        (b'{"messages": [{"role": "user", "content": "a", "k": [[{"a": 1, "b": {}, "a": 1}]]}]}', "a"),
    ],
)
def test_keys_that_are_there_twice(raw: bytes, key: str, tmp_path: Path) -> None:
    found = errors(tmp_path, raw, {"prompt": "a"})
    assert found == [f"Line 1: the key {key!r} occurs twice.", None]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": [[5]] * 4096, "n": 1024}, "prompt has 4096 prompts and n is 1024: 4194304 sequences, but the maximum of a line is 4096"),
        ({"prompt": ["the fox"] * 4097}, "prompt has 4097 prompts: 4097 sequences, but the maximum of a line is 4096"),
        ({"input": ["a"] * 1_000_000}, "input has 1000000 prompts: 1000000 sequences, but the maximum of a line is 4096"),
        ({"prompt": [[5] * 400] * 3000}, "prompt has more than 1048576 tokens; split the line"),
        ({"prompt": [5], "n": 1024, "max_tokens": 100, "logprobs": 20}, "its answer may take 164 MiB; the maximum is 64 MiB"),
        ({"prompt": [[5] * 500] * 2000, "max_tokens": 0, "echo": True, "logprobs": 0}, "its answer may take 76 MiB"),
        ({"messages": CHAT, "n": 512, "max_tokens": 100, "logprobs": True, "top_logprobs": 20}, "its answer may take 82 MiB"),
        ({"input": [[5]] * 4096}, "its answer may take 176 MiB"),
        ({"prompt": "a", "custom_id": "x" * 4097}, "custom_id has 4097 characters; the maximum is 4096"),
        ({"prompt": "a", "x" * 4_000_000: 1}, "is unknown"),
    ],
)  # fmt: skip
def test_what_is_too_much_for_a_line(body: dict[str, Any], words: str, tmp_path: Path) -> None:
    """What rank 0 would hold at once is bounded before any of it is made."""
    model = dataclasses.replace(WITH_TEXT, hidden=2048)
    said = errors(tmp_path, body, {"prompt": [[5]] * 4, "n": 1024, "max_tokens": 2}, model=model)
    assert said[0] is not None
    assert words in said[0]
    assert len(said[0]) < 300
    assert said[1] is None


def test_many_names_of_models(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "model": f"model-{number}{'x' * 200}"} for number in range(40)]
    models = checked(tmp_path, [*lines, *lines]).models
    assert sum(models.values()) == 80
    assert len(models) == requests.MAX_MODELS + 1
    assert max(map(len, models)) == 100


def test_a_repeated_key_among_many_is_found_quickly(tmp_path: Path) -> None:
    many = ",".join(f'"{n}":0' for n in range(300_000))
    raw = f'{{"prompt": "a", "k": {{{many},"299999":1}}}}'.encode()
    assert errors(tmp_path, raw) == ["Line 1: the key '299999' occurs twice."]


def test_a_deep_chat_costs_no_other_line(tmp_path: Path) -> None:
    deep = '{"messages":[{"role":"user","content":"x","k":' + "[" * 500 + "]" * 500 + "}]}"
    brackets = {"messages": [{"role": "user", "content": "<" * 6_000_000}]}
    bad = [deep.encode(), brackets, deep.encode(), brackets, deep.encode(), deep.encode()]
    found = errors(tmp_path, *bad, *({"messages": CHAT} for _ in range(6)))
    assert [error is None for error in found] == [False] * 6 + [True] * 6
    assert found[0] == "Line 1: The messages are nested more than 64 levels deep."


def test_inputs_that_are_none(tmp_path: Path) -> None:
    made = job(tmp_path)
    with pytest.raises(JobError, match=r"^The input .*in\.jsonl does not exist\.$"):
        requests.check(made.input_path, made, WITH_TEXT)
    with pytest.raises(JobError, match="is not a file"):
        requests.check(tmp_path, made, WITH_TEXT)
    for raw, words in [
        (b"\n \n", "contains no requests"),
        *(
            (LINE.encode(name), "is UTF-16; save it as UTF-8")
            for name in ("utf-16", "utf-16-le", "utf-16-be")
        ),
        *(
            (LINE.encode(name), "is UTF-32; save it as UTF-8")
            for name in ("utf-32", "utf-32-le", "utf-32-be")
        ),
        (gzip.compress(LINE.encode()), "is compressed with gzip; unpack it with gunzip"),
        (bytes.fromhex("28b52ffd2048"), "is compressed with zstd; unpack it with zstd -d"),
        (
            b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 9\n",
            "is a Git LFS pointer .* git lfs pull",
        ),
        (
            b"PK\3\4" + b"x" * 26 + b"[Content_Types].xml" + b"x" * 99,
            "is a document of an office program; save its",
        ),
        (b"PK\3\4" + b"x" * 26 + b"other.jsonl" + b"x" * 99, "is a ZIP archive"),
        (b"GGUF" + bytes(99), "is a model; type --model for it, and give a file of requests"),
        (bytes([7, 2, *[0] * 6]) + b'{"a":' * 9, "is a model; type --model for it"),
        (b"%PDF-1.7\nx", "is a PDF; extract its text"),
        (b"SQLite format 3\0" + bytes(9), "is a database of SQLite; export its table as CSV"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file; give a file of requests"),
        (b"\x7fELF" + bytes(99), "is a binary file; give a file of requests, such as JSON lines"),
        (b"ARROW1\0\0" + b"x" * 99, r"is an Arrow \(Feather\) file; save it as Parquet"),
        ("text\na\n".encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        (f"{LINE}\r{LINE}\r".encode(), "carriage returns only"),
        (b"id,prompt\n1,Hi\n", r"if it is a table, give it a name that ends in \.csv"),
        (b"id\tprompt\n1\tHi, you\n", r"give it a name that ends in \.tsv"),
        (b"id;prompt\r\n1;Hi\r\n", r"give it a name that ends in \.csv"),
        (b"Hi, there\nHo\n", r"has texts in its lines, and no objects; make objects of them: jq -cR"),
        (f"[{LINE},{LINE}]".encode(), "is a JSON array; write one object per line: jq"),
        (f"[{LINE},\n{LINE}]\n".encode(), "is a JSON array"),
        (json.dumps([json.loads(LINE)] * 2, indent=2).encode(), "is a JSON array"),
        (b"\xef\xbb\xbf\r\n" + json.dumps([json.loads(LINE)] * 2, indent=1).encode(), "is a JSON array"),
        (
            json.dumps(json.loads(LINE), indent=2).encode(),
            r"has objects that span several lines; write one object per line: jq -c '\.'\.$",
        ),
    ]:
        made.input_path.write_bytes(raw)
        with pytest.raises(JobError, match=words):
            requests.check(made.input_path, made, WITH_TEXT)


def test_an_input_that_changes_meanwhile(tmp_path: Path) -> None:
    batch = checked(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    batch.path.write_bytes(batch.path.read_bytes().replace(b"b", b"c"))
    found = batch.works()
    assert next(found).custom_id == "request-1"
    with pytest.raises(JobError, match=r"changed while it was in use \(line 2\)"):
        next(found)


def test_a_line_can_be_made_again(tmp_path: Path) -> None:
    batch = checked(tmp_path, [{"prompt": f"the fox {n}", "n": 1 + n % 3} for n in range(20)])
    assert list(batch.works()) == [batch.work(found) for found in batch.lines]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=6)  # fmt: skip


KEYS = st.sampled_from(["prompt", "messages", "input", "custom_id", "url", "method", "body", "n", "stop", "logprobs",
                        "seed", "echo", "tools", "role", "content", "temperature", "stop_token_ids"])  # fmt: skip


@given(st.dictionaries(KEYS, JSON, max_size=6))
def test_any_object_is_taken_or_refused_in_a_sentence(content: dict[str, Any]) -> None:
    said = "a sentence"
    try:
        read = decode_line(json.dumps(content).encode())
        requests.make_work(requests.Line(1, 0, 0, "a", b""), read, _ANY, WITH_TEXT)
    except RequestError as error:
        said = str(error)
    assert said
    assert "\n" not in said


_ANY = job(Path("."))


def test_what_is_wrong_with_a_line_is_said_in_a_few_words(tmp_path: Path) -> None:
    """All of it stays in memory; msgspec alone would name each of the levels down to the number."""
    deep = '{"prompt": "a", "k": ' + "[" * 800 + "1e999" + "]" * 800 + "}"
    said = errors(tmp_path, deep.encode(), {"prompt": "a"})
    assert said[0] is not None
    assert said[0].startswith("Line 1: the line is not JSON: number out of range")
    assert len(said[0]) < 500
    assert said[1] is None
