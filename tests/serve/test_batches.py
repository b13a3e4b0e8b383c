"""Files and batches of the server, by OpenAI's client: the same results as a run, also across restarts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from mpillm.store.status import Reader
from tests.conftest import clean_environment
from tests.serve.serving import serving
from tests.serve.test_server import batch as answers_of_a_run

BODIES: list[dict[str, Any]] = [
    {"prompt": f"the fox {n}", "max_tokens": 8 + 10 * n, "ignore_eos": True} for n in range(40)
]
LINES = [
    {"custom_id": f"line {n}", "method": "POST", "url": "/v1/completions", "body": body}
    for n, body in enumerate(BODIES)
]
WRONG = {"custom_id": "wrong", "method": "POST", "url": "/v1/completions", "body": {"prompt": 3.5}}


def ended(client: openai.OpenAI, name: str) -> Any:
    while (found := client.batches.retrieve(name)).status not in ("completed", "failed", "cancelled"):
        time.sleep(0.05)
    return found


def watched(folder: Path, batch: str) -> Any:
    """What `mpillm status` tells of a batch."""
    return Reader(folder / "data/batches" / batch).look()


def of_endpoint(client: openai.OpenAI, input_file_id: str, endpoint: str | None = None) -> Any:
    """A batch that has ended."""
    body = {"input_file_id": input_file_id} | ({} if endpoint is None else {"endpoint": endpoint})
    made: Any = client.post("/batches", cast_to=object, body=body)
    return ended(client, made["id"])


def lines_of(client: openai.OpenAI, name: str | None) -> list[Any]:
    assert name is not None
    return [json.loads(line) for line in client.files.content(name).text.splitlines()]


def test_a_batch_beside_clients_and_across_a_restart(tmp_path: Path) -> None:
    expected = answers_of_a_run(tmp_path, BODIES)
    source = "".join(f"{json.dumps(line)}\n" for line in [*LINES, WRONG]).encode()
    command: list[str | Path] = [sys.executable]
    with (
        serving(tmp_path, command, clean_environment()) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        file = client.files.create(file=("in.jsonl", source), purpose="batch")
        assert (file.bytes, client.files.content(file.id).content) == (len(source), source)
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"a": "b"}
        )
        while not client.batches.retrieve(made.id).request_counts.completed:  # journaled in its first moment
            time.sleep(0.02)
        # A client's request does not wait for the batch.
        alone = client.completions.create(model="chat", prompt="a", max_tokens=2)
        assert alone.usage.completion_tokens == 2
        state = client.batches.retrieve(made.id)
        assert (state.status, state.request_counts.total) == ("in_progress", 41)
        assert state.seconds_left > 0
        found = watched(tmp_path, made.id)
        assert (found.state, found.total) == ("running", 41)
    with (
        serving(tmp_path, command, clean_environment()) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        state = ended(client, made.id)
        assert (state.status, state.metadata, state.seconds_left) == ("completed", {"a": "b"}, None)
        found = watched(tmp_path, made.id)
        assert (found.starts, found.generated_tokens) == (2, sum(body["max_tokens"] for body in BODIES))
        assert state.request_counts.model_dump() == {"completed": 40, "failed": 1, "total": 41}
        answers = lines_of(client, state.output_file_id)
        assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in LINES]
        texts = [answer["response"]["body"]["choices"] for answer in answers]
        assert texts == [body["choices"] for body in expected]
        (error,) = lines_of(client, state.error_file_id)
        assert (error["custom_id"], error["response"]["status_code"]) == ("wrong", 400)
        assert [found.id for found in client.batches.list()] == [made.id]

        # One that is cancelled, one whose input is no input, and what is not there.
        body = {"prompt": "the fox", "max_tokens": 500, "ignore_eos": True}
        long = client.files.create(
            file=("long.jsonl", f"{json.dumps(body)}\n".encode() * 5000), purpose="batch"
        )
        again = client.batches.create(
            input_file_id=long.id, endpoint="/v1/completions", completion_window="24h"
        )
        with pytest.raises(
            openai.ConflictError, match=f"The batch {again.id} reads {long.id}; cancel it first"
        ):
            client.files.delete(long.id)
        assert client.batches.cancel(again.id).status == "cancelling"
        assert ended(client, again.id).status == "cancelled"
        empty = client.files.create(file=("empty.jsonl", b""), purpose="batch")
        failed = client.batches.create(
            input_file_id=empty.id, endpoint="/v1/completions", completion_window="24h"
        )
        [problem] = ended(client, failed.id).errors.data
        assert problem.message.endswith("contains no requests.")
        assert (problem.code, problem.line, problem.param) == ("bad_request", None, None)
        wrong = client.files.create(
            file=("wrong.jsonl", b'{"promt": "a"}\n\n{"prompt": {}}\n'), purpose="batch"
        ).id
        no_line = of_endpoint(client, wrong, "/v1/completions")
        assert (no_line.status, no_line.error_file_id, no_line.request_counts.failed) == ("failed", None, 2)
        assert [(problem.line, problem.code) for problem in no_line.errors.data] == [
            (1, "bad_request"),
            (3, "bad_request"),
        ]
        assert no_line.errors.data[0].message.startswith("Line 1: the line needs one of messages, ")
        # Lists come in parts, if they are asked for in parts.
        whole = [each.id for each in client.batches.list()]
        assert whole == [no_line.id, failed.id, again.id, made.id]
        part = client.batches.list(limit=2)
        assert ([each.id for each in part.data], part.has_more) == (whole[:2], True)
        assert [each.id for each in client.batches.list(limit=1)] == whole
        assert [each.id for each in client.batches.list(after=again.id)] == [made.id]
        for query in ("order=up", "limit=0", "limit=many", "after=batch-1", "before=batch-1"):
            with pytest.raises(openai.BadRequestError, match=query.partition("=")[0]):
                client.get(f"/files?{query}", cast_to=object)
        with pytest.raises(openai.BadRequestError, match="order is not supported in the URL"):
            client.get("/batches?order=asc", cast_to=object)
        kept = [each.id for each in client.files.list()]
        assert [each.id for each in client.files.list(order="asc")] == kept[::-1]
        assert [each.purpose for each in client.files.list(purpose="batch")] == ["batch"] * 4
        assert {each.purpose for each in client.files.list(purpose="batch_output")} == {"batch_output"}

        # A line for another endpoint than the batch is wrong, and a batch of such lines fails; a batch without an
        # endpoint has lines for any.
        others = of_endpoint(client, file.id, "/v1/embeddings")
        assert (others.status, others.errors.data[0].line, others.errors.data[0].param) == (
            "failed",
            1,
            "url",
        )
        assert (others.status, others.errors.data[0].message) == (
            "failed",
            "Line 1: the line is for /v1/completions, and the batch is for the endpoint /v1/embeddings.",
        )
        both = b'{"prompt": "a", "max_tokens": 1}\n{"input": "a"}\n'
        mixed = client.files.create(file=("mixed.jsonl", both), purpose="batch").id
        any_endpoint = of_endpoint(client, mixed)
        assert (any_endpoint.request_counts.completed, any_endpoint.endpoint) == (2, None)
        of_completions = of_endpoint(client, mixed, "/v1/completions")
        assert (of_completions.request_counts.completed, of_completions.request_counts.failed) == (1, 1)
        (error,) = lines_of(client, of_completions.error_file_id)
        assert error["error"]["message"].endswith(
            "2: the line is for /v1/embeddings, and the batch is for the endpoint /v1/completions."
        )
        asked: Any = {"input_file_id": mixed, "endpoint": "/v1/completions", "completion_window": "24h"}
        for more, said in (
            ({"completion_window": "1h"}, "completion_window: expected one of '24h', not '1h'"),
            ({"endpoint": "/v1/images"}, "the endpoint '/v1/images' is unknown; there are /v1/chat"),
            ({"metadata": {"a": 1}}, "metadata"),
            ({"extra_body": {"priority": 1}}, "the key 'priority' is unknown"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "until they are deleted"),
        ):
            with pytest.raises(openai.BadRequestError, match=said):
                client.batches.create(**asked | more)
        upload: Any = {"file": ("a.jsonl", b"a"), "purpose": "batch"}
        for more, said in (
            ({"purpose": "evals"}, "The purpose of a file must be 'batch'"),
            ({"expires_after": {"anchor": "created_at", "seconds": 3600}}, "until they are deleted"),
            ({"extra_body": {"name": "b"}}, "name is not supported in the form; there are file and purpose"),
        ):
            with pytest.raises(openai.BadRequestError, match=said) as refused:
                client.files.create(**upload | more)
            assert refused.value.param in {*more, *more.get("extra_body", ())}
        assert client.files.delete(long.id).deleted
        assert client.files.delete(file.id).deleted
        assert file.id not in {found.id for found in client.files.list()}
        for call in (
            lambda: client.files.retrieve(file.id),
            lambda: client.batches.retrieve("../files"),
            lambda: client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError) as absent:
                call()
        assert absent.value.param == "input_file_id"
