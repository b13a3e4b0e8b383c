"""Response bodies, field by field, against what OpenAI's and vLLM's readers take them for."""

from __future__ import annotations

import base64
import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from mpillm.batch import answers
from mpillm.batch.endpoints.embeddings import normalized
from mpillm.batch.streaming import TextStream
from mpillm.batch.work import Model, Work
from tests.job_helpers import END, TEXT, WITH_TEXT, WITHOUT_TEXT, checked, completion, works


def assert_read_by_clients(body: dict[str, Any]) -> None:
    """OpenAI's types read it, which know no null for the first token of a prompt, and no vectors in base64."""
    read: Any = {
        "chat.completion": ChatCompletion,
        "text_completion": Completion,
        "list": CreateEmbeddingResponse,
    }[body["object"]]
    body = copy.deepcopy(body)
    for choice in body.get("choices", ()):
        logprobs = choice["logprobs"] or {}
        if logprobs.get("token_logprobs", [0])[0] is None:
            choice["logprobs"] = {key: values[1:] for key, values in logprobs.items()}
    if not isinstance(body.get("data", [{}])[0].get("embedding"), str):
        read.model_validate(body)


def answer(work: Work, tokens: list[list[int]], model: Model = WITH_TEXT, **more: Any) -> dict[str, Any]:
    """The parsed result line of these tokens, one list for each choice."""
    completions = [
        completion(request, ids, seed, **more)
        for seed, (request, ids) in enumerate(zip(work.requests, tokens, strict=True))
    ]
    named = replace(model, name="small")
    line = answers.result_line(work, completions, named)
    assert b"\n" not in line
    assert line == answers.result_line(work, completions, named)
    found: dict[str, Any] = json.loads(line)
    assert (found["custom_id"], found["error"], found["response"]["status_code"]) == (
        work.custom_id,
        None,
        200,
    )
    body: dict[str, Any] = found["response"]["body"]
    assert_read_by_clients(body)
    assert (body["model"], body["id"].partition("-")[2]) == ("small", found["id"].removeprefix("batch-"))
    return body


def test_chat(tmp_path: Path) -> None:
    (work,) = works(tmp_path, {"messages": [{"role": "user", "content": "the fox"}], "custom_id": "a"})
    ids = TEXT.encode("the quick fox", False)
    body = answer(work, [[*ids, END]], finish_reason="stop", stop_id=END)
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "the quick fox"},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert (body["object"], body["created"]) == ("chat.completion", 0)
    prompt, generated = len(work.requests[0].prompt), len(ids) + 1
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def test_chat_logprobs(tmp_path: Path) -> None:
    (work,) = works(
        tmp_path, {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 3}
    )
    ids = [*TEXT.encode("fox", False), *TEXT.encode("\N{SNOWMAN}", False)]
    entries = answer(work, [ids])["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in entries] == [list(TEXT.token_bytes(token)) for token in ids]
    assert entries[-1]["token"].startswith("bytes:\\x")
    for entry in entries:
        assert sorted(entry) == ["bytes", "logprob", "token", "top_logprobs"]
        assert [sorted(top) for top in entry["top_logprobs"]] == [["bytes", "logprob", "token"]] * 3


def test_completions_of_several_prompts(tmp_path: Path) -> None:
    (work,) = works(tmp_path, {"prompt": ["the", "a fox"], "n": 2, "return_token_ids": True})
    texts = ["one", "two", "three", "four"]
    tokens = [TEXT.encode(text, False) for text in texts]
    body = answer(work, tokens)
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in body["choices"]] == tokens
    prompts = [TEXT.encode("the"), TEXT.encode("the"), TEXT.encode("a fox"), TEXT.encode("a fox")]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == prompts
    assert body["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])
    assert body["usage"]["completion_tokens"] == sum(map(len, tokens))


def test_stop_strings_and_stop_ids(tmp_path: Path) -> None:
    stop_id = TEXT.encode("x", False)[0]
    said = {"prompt": "a", "stop": ["fox", "quick fox"], "stop_token_ids": [stop_id]}
    (work,) = works(tmp_path, said)
    ids = TEXT.encode("the quick foxes", False)
    (choice,) = answer(work, [ids], finish_reason="stop")["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("the ", "quick fox")
    (choice,) = answer(work, [[*ids, stop_id]], finish_reason="stop", stop_id=stop_id)["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("the quick foxes", stop_id)
    (choice,) = answer(work, [TEXT.encode("the", False)])["choices"]
    assert (choice["text"], choice["stop_reason"], choice["finish_reason"]) == ("the", None, "length")


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}])
def test_an_answer_that_is_cut_inside_a_character(body: dict[str, Any], tmp_path: Path) -> None:
    """The bytes that lack their rest are no part of the text, but their tokens are of the ids and log-probabilities."""
    (work,) = works(tmp_path, {**body, "return_token_ids": True})
    ids = TEXT.encode("ok\N{SNOWMAN}\N{SNOWMAN}", False)
    for cut in range(1, 3):
        (choice,) = answer(work, [ids[:-cut]], finish_reason="length")["choices"]
        text = choice["message"]["content"] if "messages" in body else choice["text"]
        assert text == "ok\N{SNOWMAN}"
        assert choice["token_ids"] == ids[:-cut]
        stream = TextStream(work.endpoint, work.spec, WITH_TEXT)  # type: ignore[arg-type]
        streamed = "".join(map(stream.push, ids[:-cut]))
        assert streamed + stream.rest(text) == text


def test_scoring(tmp_path: Path) -> None:
    text = "the \N{SNOWMAN} fox"
    (work,) = works(tmp_path, {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 2})
    made = completion(work.requests[0], [])
    found = json.loads(answers.result_line(work, [made], WITH_TEXT))["response"]["body"]["choices"][0]
    ids, logprobs = work.requests[0].prompt, found["logprobs"]
    assert found["text"] == text
    assert logprobs["token_logprobs"] == [None, *made.prompt_logprobs]
    assert logprobs["top_logprobs"][0] is None
    assert len({len(values) for values in logprobs.values()} | {len(ids)}) == 1
    for token, logprob, tops in zip(
        logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
    ):
        assert token in tops
        assert 2 <= len(tops) <= 3
        assert logprob in tops.values()
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token


def test_control_tokens_in_an_echoed_prompt(tmp_path: Path) -> None:
    """The offsets count them where the prompt has them, and not where the tokenizer put them."""
    text = "the</s> fox</s>\N{SNOWMAN} quick"
    (work,) = works(tmp_path, {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 0})
    (choice,) = answer(work, [[]])["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == text
    pairs = list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))
    assert [offset for token, offset in pairs if token == "</s>"] == [3, 11]
    assert all(
        text[offset:].startswith(token)
        for token, offset in pairs
        if token != "<s>" and not token.startswith("bytes:")
    )


def test_echo_with_generated_text(tmp_path: Path) -> None:
    first, second = works(
        tmp_path,
        {"prompt": "the quick", "echo": True, "logprobs": 0, "stop": "!"},
        {"prompt": TEXT.encode("the quick"), "echo": True},
    )
    ids = TEXT.encode(" fox! and", False)
    body = answer(first, [ids], finish_reason="stop")
    found = body["choices"][0]
    assert found["text"] == "the quick fox"
    offsets, tokens = found["logprobs"]["text_offset"], found["logprobs"]["tokens"]
    assert offsets[len(first.requests[0].prompt)] == len("the quick")
    assert max(offsets) == len("the quick fox")
    assert len(tokens) == len(first.requests[0].prompt) + len(ids)
    assert found["logprobs"]["token_logprobs"][0] is None
    assert all(len(top) == 1 for top in found["logprobs"]["top_logprobs"][1:])
    assert answer(second, [ids])["choices"][0]["text"] == "the quick fox! and"


def test_without_a_tokenizer(tmp_path: Path) -> None:
    (work,) = works(
        tmp_path,
        {"prompt": [7, 11], "echo": True, "logprobs": 1, "return_token_ids": True},
        model=WITHOUT_TEXT,
    )
    found = answer(work, [[17, 2]], WITHOUT_TEXT)["choices"][0]
    words = ["token_id:7", "token_id:11", "token_id:17", "token_id:2"]
    assert found["text"] == " ".join(words)
    assert found["logprobs"]["tokens"] == words
    assert found["logprobs"]["text_offset"] == [0, 11, 23, 35]
    assert (found["token_ids"], found["prompt_token_ids"]) == ([17, 2], [7, 11])


def test_tokens_named_by_their_ids(tmp_path: Path) -> None:
    (work,) = works(tmp_path, {"prompt": "a", "logprobs": 1, "return_tokens_as_token_ids": True})
    ids = TEXT.encode("the fox", False)
    found = answer(work, [ids])["choices"][0]
    assert found["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert found["text"] == "the fox"


def test_log_probabilities_are_numbers_that_json_has(tmp_path: Path) -> None:
    (work,) = works(tmp_path, {"prompt": "a", "logprobs": 1})
    found = answer(work, [[5]], logprobs=[-math.inf], top=[[(4, -math.inf)]])["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0]
    assert set(found["top_logprobs"][0].values()) == {-9999.0}


def test_tokens_that_look_the_same_keep_the_likelier(tmp_path: Path) -> None:
    (work,) = works(tmp_path, {"prompt": "a", "logprobs": 2})
    special = TEXT.encode("</s>", False, parse_special=True)[0]
    top = [[(special, -0.1), (special, -3.0)]]
    found = answer(work, [[special]], logprobs=[-0.1], top=top)["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [{"</s>": -0.1}]


def test_embeddings(tmp_path: Path) -> None:
    plain, raw, packed = works(
        tmp_path,
        {"input": ["the", "fox"]},
        {"input": "the", "normalize": False},
        {"input": "the", "encoding_format": "base64"},
    )
    body = answer(plain, [[], []])
    assert (body["object"], [one["index"] for one in body["data"]]) == ("list", [0, 1])
    for one in body["data"]:
        assert math.isclose(math.hypot(*one["embedding"]), 1.0, rel_tol=1e-6)
    assert body["usage"] == {"prompt_tokens": plain.prompt_tokens, "total_tokens": plain.prompt_tokens}
    made = completion(raw.requests[0], []).embedding
    assert made is not None
    assert answer(raw, [[]])["data"][0]["embedding"] == made.tolist()
    data = base64.b64decode(answer(packed, [[]])["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(data, "<f4"), normalized(made))
    zero = np.zeros(3, np.float32)
    assert np.array_equal(normalized(zero), zero)


def test_errors(tmp_path: Path) -> None:
    batch = checked(tmp_path, [b"?", {"prompt": "a"}, {"prompt": "a", "n": 0}, {"url": "/v1/none"}])
    params = [
        json.loads(answers.bad_line(line))["response"]["body"]["error"]["param"]
        for line in batch.lines
        if line.error
    ]
    assert params == [None, "n", "url"]
    found = json.loads(answers.bad_line(batch.lines[0]))
    assert found["custom_id"] == "request-1"
    assert found["response"]["status_code"] == 400
    assert found["error"]["message"] == found["response"]["body"]["error"]["message"] == batch.lines[0].error
    late = json.loads(answers.error_line("x", "It failed.", 500))
    assert (late["response"]["status_code"], late["response"]["body"]["error"]["type"]) == (
        500,
        "server_error",
    )


def test_names_depend_on_the_custom_id_alone() -> None:
    one, other = (json.loads(answers.error_line(name, "x")) for name in ("a", "b"))
    assert one["id"] != other["id"]
    assert one == json.loads(answers.error_line("a", "x"))


def text_of(work: Work, tokens: list[int], **more: Any) -> tuple[str, Any]:
    (choice,) = answer(work, [tokens], **more)["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"], choice["stop_reason"]


def watched(work: Work, tokens: list[int]) -> int:
    """How many tokens are generated until the request's stop strings end it."""
    watch = work.requests[0].watch
    assert watch is not None
    return next((n for n, token in enumerate(tokens, 1) if watch(token)), len(tokens) + 1)


def test_what_of_the_stop_is_shown(tmp_path: Path) -> None:
    ids, comma = TEXT.encode("the fox, the dog", False), TEXT.encode(",", False)[-1]
    for included, shown in ((True, "the fox, the"), (False, "the fox, ")):
        body = {"prompt": "a", "stop": [" x", "the"], "min_tokens": 2, "include_stop_str_in_output": included}
        (work,) = works(tmp_path, body)
        count = watched(work, ids)
        assert count <= len(ids)
        assert text_of(work, ids[:count], finish_reason="stop") == (shown, "the")
        (work,) = works(
            tmp_path, {"prompt": "a", "stop_token_ids": [comma], "include_stop_str_in_output": included}
        )
        cut = ids[: ids.index(comma) + 1]
        assert text_of(work, cut, finish_reason="stop", stop_id=comma) == (
            "the fox," if included else "the fox",
            comma,
        )
        # The end of the model's turn is a control token, and no part of the text either way.
        assert text_of(work, [*ids[:3], END], finish_reason="stop", stop_id=END)[0] == TEXT.decode(
            ids[:3], start=False
        )


def test_stop_strings_count_after_min_tokens(tmp_path: Path) -> None:
    ids = TEXT.encode("the the the", False)
    ends = [n for n in range(1, len(ids) + 1) if TEXT.decode(ids[:n], start=False).endswith("the")]
    for minimum in range(len(ids) + 1):
        body = {"prompt": "a", "stop": "the", "min_tokens": minimum}
        (work,) = works(tmp_path, body)
        begin = len(TEXT.decode(ids[:minimum], start=False))
        expected = next(
            (n for n in ends if TEXT.decode(ids[:n], start=False)[begin:].endswith("the")), len(ids) + 1
        )
        assert watched(work, ids) == expected
        if expected <= len(ids):
            text, stop = text_of(work, ids[:expected], finish_reason="stop")
            assert (text, stop) == (TEXT.decode(ids[:expected], start=False).removesuffix("the"), "the")


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}])
def test_control_tokens_in_an_answer(body: dict[str, Any], tmp_path: Path) -> None:
    mark = TEXT.encode("<|user|>", False, parse_special=True)
    ids = [*TEXT.encode("fox", False), *mark, *TEXT.encode("dog", False), END]
    for skip, shown in ((None, "foxdog"), (True, "foxdog"), (False, "fox<|user|>dog")):
        (work,) = works(tmp_path, {**body, "skip_special_tokens": skip, "stop": "<|user|>"})
        assert text_of(work, ids, finish_reason="stop", stop_id=END)[0].replace(" ", "") == shown
        assert watched(work, ids) == (len(ids) + 1 if skip is not False else ids.index(mark[0]) + 1)


def test_log_probabilities_of_the_prompt(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a fox"}], "prompt_logprobs": 2}
    text = {"prompt": "the fox", "prompt_logprobs": 1, "max_tokens": 0}
    both = {"prompt": "the fox", "prompt_logprobs": 3, "echo": True, "logprobs": 1, "n": 2}
    for body in (chat, text, both):
        (work,) = works(tmp_path, body)
        request = work.requests[0]
        assert request.prompt_logprobs == body["prompt_logprobs"]
        made = completion(request, [])
        found = answer(work, [[]] * len(work.requests))
        first, *entries = (
            found["prompt_logprobs"] if "messages" in body else found["choices"][0]["prompt_logprobs"]
        )
        assert first is None
        for id, own, top, entry in zip(
            request.prompt[1:], made.prompt_logprobs, made.prompt_top, entries, strict=True
        ):
            assert entry[str(id)]["decoded_token"] == TEXT.token_text(id)
            listed = dict(top)
            assert entry.keys() == {str(id), *(str(token) for token in listed)}
            assert entry[str(id)]["logprob"] == listed.get(id, own)
            ranks = {token: value["rank"] for token, value in entry.items()}
            assert [ranks[str(token)] for token, _ in top] == list(range(1, len(top) + 1))
            assert ranks[str(id)] is None or id in listed
        if body is both:
            tops = found["choices"][1]["logprobs"]["top_logprobs"][1:]
            assert all(1 <= len(top) <= 2 for top in tops)


def test_the_best_of_several(tmp_path: Path) -> None:
    (work,) = works(tmp_path, {"prompt": ["the", "a"], "n": 2, "best_of": 4})
    assert len(work.requests) == 8
    words = ["one", "two", "three", "four"] * 2
    scores = [-3.0, -1.0, -9.0, -2.0, -1.0, -4.0, -2.0, -3.0]
    completions = []
    for request, word, score in zip(work.requests, words, scores, strict=True):
        ids = TEXT.encode(word, False)
        completions.append(completion(request, ids, logprobs=[score] * len(ids), top=[[]] * len(ids)))
    body = json.loads(answers.result_line(work, completions, WITH_TEXT))["response"]["body"]
    assert [(one["index"], one["text"], one["logprobs"]) for one in body["choices"]] == [
        (0, "two", None), (1, "four", None), (2, "one", None), (3, "three", None),
    ]  # fmt: skip
    assert body["usage"]["completion_tokens"] == sum(len(TEXT.encode(word, False)) for word in words)
    (plain,) = works(tmp_path, {"prompt": "the", "n": 2, "best_of": 2})
    assert plain.requests[0].logprobs is None


def test_a_message_that_is_continued(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the quick "}]
    own, open_end, closed = works(
        tmp_path,
        {"messages": messages, "continue_final_message": True, "echo": True},
        {"messages": messages, "continue_final_message": True, "add_special_tokens": True},
        {"messages": messages, "add_generation_prompt": False},
    )
    ids = list(own.requests[0].prompt)
    assert TEXT.decode(ids, skip_special=False).endswith("<|assistant|>the quick ")
    assert list(open_end.requests[0].prompt) == [*TEXT.encode("", True), *ids]
    assert TEXT.decode(closed.requests[0].prompt, skip_special=False).endswith("<|assistant|>the quick </s>")
    fox = TEXT.encode("fox", False)
    assert text_of(own, fox)[0] == "the quick fox"
    assert text_of(open_end, fox)[0] == "fox"
