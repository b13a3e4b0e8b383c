"""What callers hand over, without ranks: arrays, series and iterators, and the keys of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas
import polars
import pytest

from mpillm import LLM, Job
from mpillm.api.plain import chats_of, json_of, ranks_of, several
from mpillm.api.results import Ragged
from mpillm.errors import JobError
from tests.job_helpers import CHAT

TEXTS = ["the fox", "a ship", "\N{SNOWMAN} \N{FOX FACE}"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("the fox", ["the fox"]),
        ([], []),
        (np.array([5, 6]), [[5, 6]]),
        (range(3), [[0, 1, 2]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([np.array([5, 6]), (7,), [np.int64(8)]], [[5, 6], [7], [8]]),
        (tuple(TEXTS), TEXTS),
        (iter(TEXTS), TEXTS),
        (np.array(TEXTS), TEXTS),
        (pandas.Series(TEXTS, index=[7, 3, 9]), TEXTS),
        (pandas.DataFrame({"text": TEXTS})["text"][1:], TEXTS[1:]),
        (polars.Series(TEXTS), TEXTS),
        ({"prompt": "a"}, [{"prompt": "a"}]),
    ],
)
def test_requests_of_any_kind(given: Any, expected: list[Any]) -> None:
    assert [json.loads(json_of(one)) for one in several(given)] == expected


@pytest.mark.parametrize("wrong", [5, None, b"the fox", 0.5])
def test_what_is_no_request(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected a text, token ids, or several of these, not"):
        several(wrong)


def test_token_ids_are_whole_numbers() -> None:
    for wrong in (np.array([5.0, 6.0]), [5, 6.5], pandas.Series([5, None])):
        with pytest.raises(TypeError, match="token ids must be whole numbers, not "):
            several(wrong)


@pytest.mark.parametrize(
    "wrong", ["Hello", ["Hello"], {"role": "user"}, None, 5, [[{"role": "user"}], "Hello"]]
)
def test_what_is_no_chat(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r'chat takes a list such as \[{"role": "user"'):
        chats_of(wrong)


def test_one_chat_and_several() -> None:
    chat = [{"role": "user", "content": "Hi"}]
    assert chats_of(chat) == chats_of(iter(chat)) == chats_of([chat]) == [chat]
    assert chats_of((chat, iter(chat)))[0] == chat
    assert chats_of([]) == []


@pytest.mark.parametrize("wrong", [0, -1, True, "2", 1.0, None])
def test_what_is_no_number_of_ranks(wrong: Any) -> None:
    with pytest.raises(JobError, match="ranks must be a whole number >= 1, not"):
        ranks_of(wrong)


def test_bytes_are_to_be_decoded() -> None:
    with pytest.raises(TypeError, match=r"expected a text, not bytes; decode them: b'the fox'\.decode\(\)"):
        json_of([b"the fox"])


@pytest.mark.parametrize("key", ["input", "output", "prompt", "messages", "request"])
def test_a_model_takes_no_files(key: str) -> None:
    with pytest.raises(JobError, match=f"LLM takes no {key}: requests are for its methods"):
        LLM(CHAT, **{key: "a"})


def test_a_communicator_is_one_of_mpi4py() -> None:
    with pytest.raises(JobError, match="comm must be a communicator of mpi4py, not 3"):
        LLM(CHAT, comm=3)  # type: ignore[arg-type]


def test_rows_are_counted_from_either_end() -> None:
    rows = Ragged(np.arange(5), np.array([0, 2, 5]))
    assert rows[-1].tolist() == rows[np.int64(1)].tolist() == [2, 3, 4]
    assert [len(row) for row in rows] == [2, 3]
    with pytest.raises(IndexError):
        rows[2]
    with pytest.raises(TypeError):
        rows[0:1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"inputs": "a"}, "Job has an unknown key 'inputs'; did you mean 'input'"),
        (
            {"max_tokens": 5},
            r"Job has an unknown key 'max_tokens'; did you mean sampling=\{'max_tokens': \.\.\.\}\?$",
        ),
        ({"ranks": 2}, r"given to run: Job\(\.\.\.\)\.run\(ranks=2\)"),
        ({"memory": "4GiB"}, "memory: expected a table, with keys such as memory.weights, not '4GiB'"),
        ({"input": [{"prompt": "a"}]}, r"input: expected a path \(requests in a list are for LLM"),
        ({"model": None}, "model: expected a path, not None"),
        ({"layout": 2}, "layout: expected a table, with keys such as layout.replicas, not 2"),
    ],
)
def test_wrong_keys_of_a_job(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        Job(**{"model": str(CHAT), "input": "a", "output": "b", **keys})
    with pytest.raises(JobError, match=r'^Job does not say where its input is; add input="\.\.\."\.$'):
        Job(output="b")


def test_what_json_has_no_form_for() -> None:
    body = {
        "stop": {"a"},
        "temperature": np.float64(0.5),
        "n": np.int32(2),
        "documents": pandas.Series(["a", "b"]),
    }
    assert json.loads(json_of(body)) == {"stop": ["a"], "temperature": 0.5, "n": 2, "documents": ["a", "b"]}
    for wrong in (object(), 3j):
        with pytest.raises(TypeError, match="cannot be written as JSON"):
            json_of({"prompt": wrong})


def test_the_keys_of_a_job(tmp_path: Path) -> None:
    """Keys with dots, spaces, quotes and equals signs, null within a schema, and characters beyond 16 bits."""
    properties: dict[str, Any] = {
        name: {"anyOf": [{"type": "null"}, {"const": None}, {"enum": ["\N{FOX FACE}", 3, 1.5, True]}]}
        for name in ("plain", "first name", "a.b", 'say "so"', "x=y", "\N{FOX FACE}", "#", "\x7f")
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    messages = [
        {"role": "user", "content": "\N{FOX FACE} \x7f {text}\n"},
        {"role": "assistant", "content": ""},
    ]
    job = Job(
        model=CHAT,
        input=tmp_path / "in.jsonl",
        output=tmp_path / "out",
        quantize=None,
        request={"messages": messages, "max_tokens": 3},
        sampling={
            "stop": ["\N{FOX FACE}", '"'],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        },
        adapters={"french.v2=3": str(tmp_path / "french"), "a b": "b"},
    )
    assert job.spec.request == {"messages": messages, "max_tokens": 3}
    assert list(job.spec.sampling.stop) == ["\N{FOX FACE}", '"']
    found: Any = msgspec.to_builtins(job.spec.sampling.response_format)
    assert found["json_schema"]["schema"] == schema
    assert set(job.spec.adapters) == {"french.v2=3", "a b"}
    prompts = Job(model=CHAT, input="a", output="b", prompt="\N{FOX FACE} {text}", layout={"stages": 2})
    assert prompts.spec.request == {"prompt": "\N{FOX FACE} {text}"}
    assert prompts.spec.layout.stages == 2
