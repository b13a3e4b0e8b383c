"""Bodies of all endpoints, end to end but for the model: check, template, tokenizer, grammar, and an answer made up."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpillm import spec
from mpillm.batch import answers, requests
from mpillm.batch.endpoints import COLUMNS, ENDPOINTS
from mpillm.batch.endpoints.chat import ChatCompletionsEndpoint
from mpillm.batch.endpoints.prompts import MAX_SEQUENCES
from mpillm.batch.streaming import ChatStream
from mpillm.batch.work import Model, Work
from mpillm.engine.sequence import FinishedCompletion, Request
from mpillm.errors import JobError
from mpillm.model.pooled import Classifier, Dense
from mpillm.planning import memory
from mpillm.planning.input_memory import input_needs
from mpillm.spec import Spec
from mpillm.text import load_tokenizer
from mpillm.text.chat_formats.known import CALLS
from tests.fuzz import bodies
from tests.fuzz.target import Target
from tests.job_helpers import completion
from tests.text.chats import STYLE, TEMPLATES
from tests.text.vocabularies import write_directory

SPARE = 32 << 20  # bytes that a body may take besides what is planned for it: the process's own part has them
CONTEXT = 4096
HIDDEN = 8  # as many as `completion` makes up
ANSWERED = 20_000  # log-probabilities of an answer that is made up
GOOD = b'{"custom_id": "good", "url": "/v1/embeddings", "method": "POST", "body": {"input": [5]}}\n'
STEPS = 6  # tokens that are drawn of a grammar


def body_target(folder: Path) -> Target:
    """Lines that a grammar makes of the bytes; the memory of each is what is planned.

    The first byte says which model it is for.
    """
    pairs = list(_models(folder))

    def run(data: bytes) -> None:
        draw = bodies.Draw(data[1:])
        job, model = pairs[(data or b"\0")[0] % len(pairs)]
        job.input_path.write_bytes(bodies.line(draw, _urls(model)) + b"\n" + GOOD)
        before = _start_to_measure()
        batch = None
        with contextlib.suppress(JobError):  # what is no line at all, by its beginning
            batch = requests.check(job.input_path, job, model)
        if batch is None:
            return
        *_, good = batch.lines
        assert good.error is None, "one line costs no other"
        for line in batch.lines:
            assert line.error is None or len(line.error) < 500
        works = list(batch.works())
        for work in works:
            assert len(work.requests) <= MAX_SEQUENCES
            assert all(0 < len(one.prompt) + one.max_tokens <= CONTEXT for one in work.requests)
            assert all(0 <= token < model.vocab for one in work.requests for token in one.prompt)
        taken = memory.peak() - before
        assert taken <= SPARE + input_needs(job, model.hidden).kept(1, model.vocab), f"{taken} bytes"
        for work in works:
            _answer(work, draw, model)

    draw = random.Random(1)
    return Target(run, [draw.randbytes(40) for _ in range(200)])


def _models(folder: Path) -> Iterator[tuple[Spec, Model]]:
    """Models of each kind, and of each format of tool calls, with the jobs that ask them."""

    def job(*settings: str) -> Spec:
        return spec.load(None, settings, input=str(folder / "in.jsonl"), output=str(folder / "out"))

    calls = iter(CALLS)
    for name, style in STYLE.items():
        text = load_tokenizer(write_directory(folder / name, style, TEMPLATES[name]))
        assert text is not None
        ends = frozenset({text.encode("</s>", False, parse_special=True)[0]})
        model = Model(vocab=text.vocab_size, max_position=CONTEXT, hidden=HIDDEN, kv_tokens=CONTEXT, text=text,
                      end_ids=ends, name=name, adapters=("tuned",))  # fmt: skip
        yield job(), model
        for _ in range(-(-len(CALLS) // len(STYLE))):
            if (named := next(calls, None)) is not None:
                yield job(f"chat.tool_calls={named}", 'chat.reasoning=["<think>", "</think>"]'), model
    yield job(), Model(vocab=300, max_position=CONTEXT, hidden=HIDDEN)
    yield job(), Model(vocab=model.vocab, max_position=CONTEXT, hidden=HIDDEN, text=text, generates=False)
    for labels in (("yes",), ("no", "yes"), ("a", "b", "c")):
        layers = (Dense(np.eye(len(labels), HIDDEN, dtype=np.float32)),)
        classifier = Classifier("last", layers, labels, "sigmoid" if len(labels) == 1 else "softmax")
        yield job(), Model(vocab=model.vocab, max_position=CONTEXT, hidden=HIDDEN, text=text, classifier=classifier,
                           generates=len(labels) == 2, pair_template="{query} {document}")  # fmt: skip


def _urls(model: Model) -> list[str]:
    """Those that the model can answer."""
    generating = [
        one.url for one in ENDPOINTS if one.needs_head and (model.text or one.url == "/v1/completions")
    ]
    pairs = ["/v1/score", "/v1/rerank"] if model.text is not None else []
    classifying = ["/v1/classify"] if model.classifier is not None else []
    return ["/v1/embeddings", *pairs, *classifying, *(generating if model.generates else ())]


def _answer(work: Work, draw: bodies.Draw, model: Model) -> None:
    """Answer a line with made-up tokens: the answer is JSON, its columns are known, and as a stream it is the same."""
    wanted = sum(
        (0 if one.logprobs is None else STEPS * (1 + one.logprobs))
        + (0 if one.prompt_logprobs is None else len(one.prompt) * (1 + one.prompt_logprobs))
        for one in work.requests
    )
    if wanted > ANSWERED or len(work.requests) > 50:
        return
    found = [_completion(request, draw, model) for request in work.requests]
    body = json.loads(answers.result_line(work, found, model))["response"]["body"]
    known = {column.group for column in COLUMNS}
    assert all(set(work.endpoint.values(work, one, model)) <= known for one in found)
    if isinstance(work.endpoint, ChatCompletionsEndpoint):
        for choice, one in zip(body["choices"], found, strict=True):
            _stream(work.endpoint, choice["message"], one, work.spec, model)


def _completion(request: Request, draw: bodies.Draw, model: Model) -> FinishedCompletion:
    if request.only_reads:
        return completion(request, [])
    if request.constraint is not None:
        return completion(request, _held(request, draw, model))
    text = bodies.answer(draw)
    tokens = [draw.below(model.vocab)]
    if model.text is not None and draw.often(80):
        tokens = model.text.encode(text, False, parse_special=draw.often(50)) or tokens
    tokens = tokens[: request.max_tokens]
    for at, token in enumerate(tokens):
        if token in request.stop_ids:
            return completion(request, tokens[: at + 1], finish_reason="stop", stop_id=token)
    return completion(request, tokens, finish_reason=draw.one(("stop", "length")))


def _held(request: Request, draw: bodies.Draw, model: Model) -> list[int]:
    """Tokens that a grammar allows, one after the other."""
    assert request.constraint is not None
    matcher, tokens = request.constraint(), list[int]()
    while not matcher.ended and len(tokens) < min(STEPS, request.max_tokens):
        bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")[: model.vocab]
        allowed = np.flatnonzero(bits).tolist()
        if not allowed:
            assert not matcher.complete, "nothing may follow, and it has not ended"
            break
        token = draw.one(allowed)
        assert matcher.accepts(token)
        matcher.push(token)
        tokens.append(token)
    return tokens or [0]


def _stream(
    endpoint: ChatCompletionsEndpoint,
    message: dict[str, object],
    done: FinishedCompletion,
    job: Spec,
    model: Model,
) -> None:
    """The deltas of a stream make the message."""
    stream = ChatStream(endpoint, done.request, job, model)
    deltas = [*map(stream.push, done.tokens), stream.rest(message)]
    for key in ("content", "reasoning_content"):
        assert "".join(delta.get(key) or "" for delta in deltas) == (message.get(key) or ""), (
            message,
            deltas,
        )
    called = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [{key: value for key, value in call.items() if key != "index"} for call in called] == (
        message.get("tool_calls") or []
    )


def _start_to_measure() -> int:
    """Begin to count the process's peak anew, and return the bytes that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory.peak()
