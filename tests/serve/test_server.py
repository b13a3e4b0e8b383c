"""The server, asked by OpenAI's own client and by clients that vanish."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from mpillm.serve import server as server_module
from mpillm.serve.server import ServeOptions
from tests.conftest import HANGS, Mpi, clean_environment, run_bounded
from tests.job_helpers import CHAT, without_tokenizer
from tests.model.golden import FIXTURES
from tests.serve import load
from tests.serve.serving import serving

KEY = "secret key"
WORDS = ["the", "fox", "end", "a", "b", "over", "dog", "quick"]


ADAPTED = ("--set", f"adapters.adapted={FIXTURES / 'adapters/chat_all'}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    env = clean_environment(MPILLM_API_KEY=KEY)
    with serving(tmp_path_factory.mktemp("serve"), [sys.executable], env, *ADAPTED) as (url, _):
        yield url


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def prompt(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 12)))


def batch(folder: Path, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of a run."""
    source = folder / "in.jsonl"
    source.write_text("".join(f"{json.dumps(body)}\n" for body in bodies))
    words = ["--model", CHAT, "--input", source, "--output", folder / "out"]
    assert (
        run_bounded([sys.executable, "-m", "mpillm", "run", *words], env=clean_environment()).returncode == 0
    )
    lines = (folder / "out/results.jsonl").read_text().splitlines()
    return [json.loads(line)["response"]["body"] for line in lines]


def test_answers_are_those_of_a_batch(server: str, client: openai.OpenAI, tmp_path: Path) -> None:
    draw = random.Random(7)
    chats = [{"messages": [{"role": "user", "content": prompt(draw)}], "max_tokens": 9} for _ in range(3)]
    stop = {"prompt": prompt(draw), "max_tokens": 24, "logprobs": 2}
    scored = {"prompt": [prompt(draw), [7, 8, 9]], "max_tokens": 0, "echo": True, "logprobs": 1}
    vectors = {"input": [prompt(draw), prompt(draw)]}
    pairs = {"text_1": prompt(draw), "text_2": [prompt(draw), prompt(draw)]}
    ranks = {"query": prompt(draw), "documents": [prompt(draw) for _ in range(3)], "top_n": 2}
    found = batch(tmp_path, [*chats, stop, scored, vectors, pairs, ranks])
    for body, expected in zip(chats, found, strict=False):
        made = client.chat.completions.create(model="chat", **body)  # type: ignore[call-overload]
        assert made.choices[0].message.content == expected["choices"][0]["message"]["content"]
        assert made.usage.model_dump(exclude_none=True) == expected["usage"]
        with client.chat.completions.create(
            model="chat", stream=True, stream_options={"include_usage": True}, **body
        ) as stream:  # type: ignore[call-overload]
            chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == made.choices[0].message.content
        assert [chunk.usage for chunk in chunks if chunk.usage] == [made.usage]
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert reasons == [None] * (len(reasons) - 1) + [made.choices[0].finish_reason]
        assert len(chunks) > 4, "a stream comes bit by bit"
    for body, expected in zip((stop, scored), found[3:5], strict=True):
        made = client.completions.create(model="chat", **body)  # type: ignore[call-overload]
        assert [choice.text for choice in made.choices] == [choice["text"] for choice in expected["choices"]]
        for choice, other in zip(made.choices, expected["choices"], strict=True):
            assert choice.logprobs.token_logprobs == other["logprobs"]["token_logprobs"]
    made = client.embeddings.create(model="chat", encoding_format="float", **vectors)  # type: ignore[arg-type]
    assert [row.embedding for row in made.data] == [row["embedding"] for row in found[5]["data"]]
    for urls, body, expected in (
        (("/v1/score", "/score"), pairs, found[6]["data"]),
        (("/v1/rerank", "/rerank", "/v2/rerank"), ranks, found[7]["results"]),
    ):
        for url in urls:
            answer: Any = client.post(f"{server}{url}", cast_to=object, body=body)
            assert answer.get("data", answer.get("results")) == expected
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").post(f"{server}{urls[-1]}", cast_to=object, body=body)
    with pytest.raises(openai.BadRequestError, match="the model has no classifier"):
        client.post("/classify", cast_to=object, body={"input": "a fox"})


def test_a_stream_never_shows_what_a_stop_string_takes_back(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "chat", "prompt": "the quick fox", "max_tokens": 40}
    text = client.completions.create(**body).choices[0].text
    assert len(text) > 10
    for start in range(2, len(text) - 4, max(len(text) // 6, 1)):
        stop = text[start : start + 3]
        whole = client.completions.create(stop=stop, **body).choices[0]
        with client.completions.create(stop=stop, stream=True, **body) as stream:
            streamed = [chunk.choices[0] for chunk in stream]
        assert "".join(choice.text for choice in streamed) == whole.text == text[: text.find(stop)]
        assert streamed[-1].finish_reason == whole.finish_reason == "stop"


@pytest.mark.parametrize(
    "more",
    [{"echo": True}, {"skip_special_tokens": False}, {"include_stop_str_in_output": True, "stop": "o"}],
)
def test_a_stream_of_what_tokens_alone_do_not_say(client: openai.OpenAI, more: dict[str, Any]) -> None:
    body: dict[str, Any] = {"model": "chat", "prompt": "the quick fox", "max_tokens": 30, "extra_body": more}
    whole = client.completions.create(**body).choices[0]
    with client.completions.create(stream=True, **body) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.text
    assert whole.text


def test_a_seed_gives_the_same_answer_again(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "chat", "prompt": "the", "max_tokens": 12, "temperature": 1.5, "n": 3}

    def texts(**more: Any) -> list[str]:
        return [choice.text for choice in client.completions.create(**body, **more).choices]

    assert texts(seed=5) == texts(seed=5)
    assert len({*texts(seed=5), *texts(seed=6), *texts(), *texts()}) > 9


USER = b'{"messages": [{"role": "user", "content": "a"}]'


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "message"),
    [
        (b"{", 400, None, None, "the body is not JSON"),
        (b"[1]", 400, None, None, "the body is not a JSON object"),
        (b'{"max_tokens": 3}', 400, "messages", None, "key 'messages' is missing"),
        (b'{"prompt": "a"}', 400, "prompt", None, "it is for /v1/completions, and chats have messages"),
        (b'{"messages": [], "max_tokens": 3}', 400, "messages", None, "messages: expected a list"),
        (b'{"messages": [{"content": "a"}]}', 400, "messages[0]", None, "messages[0] needs a role such as 'user'"),
        (USER + b', "max_tokns": 3}', 400, "max_tokns", None, "did you mean 'max_tokens'"),
        (USER + b', "stream": "yes"}', 400, "stream", None, "stream must be true or false"),
        (USER + b', "stream_options": {"usage": true}}', 400, "stream_options.usage", None, "is unknown"),
        (USER + b', "top_logprobs": 3}', 400, "top_logprobs", None, "top_logprobs needs logprobs: true"),
        (USER + b', "model": "gpt-4"}', 404, "model", "model_not_found", "There is no model 'gpt-4'"),
        (USER[:-3] + b"a" * 5000 + b'"}]}', 400, "messages", "context_length_exceeded", "the prompt has"),
        (USER + b', "max_tokens": 100000}', 400, "messages", "context_length_exceeded", "and max_tokens is 100000"),
        (b" " * (33 << 20), 413, None, None, "The request has more than"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    client: openai.OpenAI, body: bytes, status: int, param: str | None, code: str | None, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as found:
        client.post(
            "/chat/completions",
            cast_to=object,
            content=body,
            options={"headers": {"content-type": "application/json"}},
        )
    error = found.value
    assert (error.status_code, error.param, error.code) == (status, param, code), error.body
    assert error.type == "invalid_request_error"
    assert message in error.message


def metrics_of(client: openai.OpenAI, server: str) -> dict[str, float]:
    lines = client._client.get(f"{server}/metrics").text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
    }


def test_what_is_counted(client: openai.OpenAI, server: str) -> None:
    """What only grows is a counter; clients that go and batches count as well."""
    text = client._client.get(f"{server}/metrics").text
    kinds = dict(re.findall(r"^# TYPE mpillm_(\w+) (counter|gauge)$", text, flags=re.M))
    counted = ("steps", "prompt_tokens", "shared_tokens", "generated_tokens", "preemptions", "requests")
    assert kinds.items() >= {f"{name}_total": "counter" for name in counted}.items()
    assert {name for name, kind in kinds.items() if kind == "gauge"} >= {"running", "waiting"}

    def after(name: str, count: float) -> None:
        while metrics_of(client, server).get(name, 0) < before.get(name, 0) + count:
            time.sleep(0.02)

    before = metrics_of(client, server)
    streams = 'mpillm_requests_total{endpoint="/v1/completions",status="%s"}'
    body: dict[str, Any] = {"model": "chat", "prompt": "counted", "extra_body": {"ignore_eos": True}}
    with client.completions.create(stream=True, max_tokens=300, **body) as stream:
        next(iter(stream))
    after(streams % 499, 1)
    with client.completions.create(stream=True, max_tokens=3, **body) as stream:
        list(stream)
    after(streams % 200, 1)
    after("mpillm_generated_tokens_total", 4)
    before = metrics_of(client, server)
    line = b'{"prompt": "in a batch", "max_tokens": 5, "ignore_eos": true}\n'
    file = client.files.create(file=("in.jsonl", line), purpose="batch")
    client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    after("mpillm_generated_tokens_total", 5)
    after("mpillm_prompt_tokens_total", 1)


def test_models_health_metrics_and_the_key(client: openai.OpenAI, server: str) -> None:
    assert [model.id for model in client.models.list()] == ["chat", "adapted"]
    assert [client.models.retrieve(name).id for name in ("chat", "adapted")] == ["chat", "adapted"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    for key in ("wrong", "", "secret"):
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key=key or "x").models.list()
        assert (refused.value.type, refused.value.code) == ("invalid_request_error", "invalid_api_key")
        assert refused.value.request_id.startswith("req_")
    ids = {client.models.list()._request_id for _ in range(2)}
    assert len(ids) == 2
    assert client.models.list(extra_headers={"X-Request-ID": "a proxy's"})._request_id == "a proxy's"
    # A browser asks for a page of another site without the key.
    asked = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    answer = client._client.options(f"{server}/v1/models", headers=asked)
    said = "pages of other sites are refused; --allowed-origins http://elsewhere.example allows this one."
    assert (answer.status_code, answer.json()["error"]["message"].endswith(said)) == (403, True)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="chat", messages=[])
    with pytest.raises(openai.APIStatusError) as found:
        client.post("/batches", cast_to=object, content=b" " * (2 << 20))
    assert found.value.status_code == 413
    http = client._client
    assert http.get(f"{server}/health").json()["status"] == "ok"
    described = http.get(f"{server}/openapi.json").json()
    assert (described["security"], described["paths"]["/health"]["get"]["security"]) == ([{"key": []}], [])
    text = http.get(f"{server}/metrics").text
    assert 'mpillm_requests_total{endpoint="/v1/chat/completions",status="400"}' in text
    assert http.get(server).headers["content-type"].startswith("text/html")


def test_an_answer_whose_every_token_is_forced_waits_for_no_other_request(
    client: openai.OpenAI, tmp_path: Path
) -> None:
    (alone,) = batch(tmp_path, [{"prompt": "a", "max_tokens": 40, "guided_choice": ["the fox"]}])
    assert alone["choices"][0]["text"] == "the fox"
    for more in ({"guided_choice": ["the fox"]}, {"structured_outputs": {"regex": "the fox"}}):
        made = client.completions.create(model="chat", prompt="a", max_tokens=40, extra_body=more)
        assert made.choices[0].text == "the fox"


def test_an_adapter_is_asked_by_its_name(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"prompt": "the quick brown fox", "max_tokens": 9}
    base, adapted = (client.completions.create(model=name, **body) for name in ("chat", "adapted"))
    assert (base.model, adapted.model) == ("chat", "adapted")
    assert base.choices[0].text != adapted.choices[0].text
    chunks = list(client.completions.create(model="adapted", stream=True, **body))
    assert {chunk.model for chunk in chunks} == {"adapted"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == adapted.choices[0].text


def test_64_clients_half_of_which_vanish(client: openai.OpenAI, server: str, tmp_path: Path) -> None:
    """Nobody hangs, the others get what a batch would give them, and nothing is computed for those that went."""
    bodies = load.mixed_bodies(64, tokens=24, words=60, seed=3)
    expected, _ = load.batch(tmp_path, CHAT, bodies)
    found = load.ask_all(client, bodies, half_vanish=True)
    assert [text for text in found if text is not None] == expected[::2]
    load.wait_until_idle(client, server)
    assert load.measure_other(client, bodies[:2]) > 0, "what --against asks of another server"


def test_streams_that_are_dropped_in_the_middle(client: openai.OpenAI, server: str) -> None:
    """By 60 asynchronous clients at once: the other 30 get what each would get alone, and the engine is idle soon."""
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"the fox {n}"}], "max_tokens": 20 + n % 7}
        for n in range(90)
    ]

    async def ask(asked: openai.AsyncOpenAI, body: dict[str, Any], dropped_at: int | None = None) -> str:
        text, chunks = "", 0
        more = {"ignore_eos": True}
        async with await asked.chat.completions.create(
            model="chat", stream=True, extra_body=more, **body
        ) as stream:
            async for chunk in stream:
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                chunks += 1
                if chunks == dropped_at:
                    break
        return text

    async def ask_all() -> None:
        longer = {"max_tokens": 400}
        async with openai.AsyncOpenAI(
            base_url=f"{server}/v1", api_key=KEY, max_retries=0, timeout=HANGS
        ) as asked:
            alone = [await ask(asked, body) for body in bodies[::3]]
            stay = [asyncio.create_task(ask(asked, body)) for body in bodies[::3]]
            drop = [
                asyncio.create_task(ask(asked, body | longer, n % 9 + 1))
                for n, body in enumerate(bodies[1::3])
            ]
            cancelled = [asyncio.create_task(ask(asked, body | longer)) for body in bodies[2::3]]
            for task in cancelled:
                await asyncio.sleep(0.01)
                task.cancel()
            assert await asyncio.gather(*stay) == alone
            await asyncio.gather(*drop)
            gone = await asyncio.gather(*cancelled, return_exceptions=True)
            assert not any(isinstance(one, Exception) for one in gone)
            assert any(isinstance(one, asyncio.CancelledError) for one in gone)

    asyncio.run(ask_all())
    load.wait_until_idle(client, server)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    """Token ids are answered; texts, and a batch of nothing else, are refused with what to do."""
    (tmp_path / "bare").mkdir()
    bare = without_tokenizer(tmp_path / "bare")
    with (
        serving(tmp_path, [sys.executable], clean_environment(), model=bare) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        text = client.completions.create(model="bare", prompt=[5, 6], max_tokens=2).choices[0].text
        assert text.count("token_id:") == 2
        with pytest.raises(openai.BadRequestError, match="no tokenizer; give token ids, or put its"):
            client.completions.create(model="bare", prompt="text", max_tokens=2)
        message: Any = {"role": "user", "content": "text"}
        with pytest.raises(openai.BadRequestError, match="token ids as the prompt of /v1/completions"):
            client.chat.completions.create(model="bare", messages=[message])
        for source, said in (
            (b'{"prompt": "text"}', "bare can answer no request of in.jsonl; line 1: prompt is a string and"),
            (b"", "The input in.jsonl contains no requests."),
            (b"[1,\n 2]", "The input in.jsonl is a JSON array; write one object per line"),
        ):
            file = client.files.create(file=("in.jsonl", source), purpose="batch")
            made = client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            while (state := client.batches.retrieve(made.id)).status != "failed":
                time.sleep(0.02)
            assert state.errors.data[0].message.startswith(said)


@pytest.mark.mpiexec
def test_on_two_ranks_until_a_signal(mpi: Mpi, tmp_path: Path) -> None:
    """The same answers on two ranks, after a rest that is longer than the deadline for ranks that hang."""
    command = mpi.command(2)
    env = mpi.environment(MPILLM_DEADLINE="3")
    with serving(tmp_path, command, env) as (url, process):
        time.sleep(4)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            body: dict[str, Any] = {"model": "chat", "prompt": "the fox", "max_tokens": 8}
            with client.completions.create(stream=True, **body) as stream:
                text = "".join(chunk.choices[0].text for chunk in stream)
            assert text == client.completions.create(**body).choices[0].text
        assert process.poll() is None


def test_a_server_for_others_without_a_key_is_told() -> None:
    for host, key, warned in (
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("0.0.0.0", "secret", False),
        ("0.0.0.0", None, True),
        ("192.0.2.7", None, True),
        ("::", None, True),
    ):
        *warnings, line = server_module._greeting("tiny", host, 80, ServeOptions(host, 80, key))
        assert line.startswith(f"tiny answers at http://{f'[{host}]' if ':' in host else host}:80 (")
        assert bool(warnings) == warned
        for warning in warnings:
            assert f"can use the server (--host {host}); add --api-key KEY" in warning


def test_the_end(tmp_path: Path) -> None:
    friend = "https://friend.example"
    origins = ("--allowed-origins", friend, "http://localhost:3000")
    with serving(tmp_path, [sys.executable], clean_environment(), *origins) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        body: dict[str, Any] = {"model": "chat", "prompt": "the", "max_tokens": 450}
        short: dict[str, Any] = body | {"max_tokens": 1}
        port = url.rpartition(":")[2]
        page = {"Sec-Fetch-Site": "same-origin"}
        for own in (
            {"Origin": url},
            {"Origin": friend},
            {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"},
            {"Host": "friend.example", **page},
        ):
            assert client.completions.create(**short, extra_headers=own).choices
        for foreign in (
            {"Origin": "http://elsewhere.example"},
            {"Origin": "null"},
            {"Host": f"elsewhere.example:{port}", **page},
            {"Origin": f"http://elsewhere.example:{port}", "Host": f"elsewhere.example:{port}"},
        ):
            with pytest.raises(openai.PermissionDeniedError, match="pages of other sites"):
                client.completions.create(**short, extra_headers=foreign)
        asked = {"Origin": friend, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type"
        allowed = client._client.options(f"{url}/v1/completions", headers=asked)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, friend)
        answer = client._client.get(f"{url}/v1/models", headers={"Origin": friend})
        assert answer.headers["access-control-expose-headers"] == "x-request-id"
        refused = client._client.options(f"{url}/v1/models", headers=asked | {"Origin": "http://a.example"})
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)
        with (
            client,
            client.completions.create(stream=True, extra_body={"ignore_eos": True}, **body) as stream,
        ):
            next(iter(stream))
            process.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIError, match="The server stopped before the answer was complete"):
                list(stream)
        assert process.wait() == 0
    assert "The server has ended." in (tmp_path / "log").read_text()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = [sys.executable, "-m", "mpillm", "serve", "--model", CHAT, "--port", port]
        done = run_bounded(words, env=clean_environment())
        assert (done.returncode, f"cannot listen on 127.0.0.1 port {port}" in done.stderr) == (2, True)
