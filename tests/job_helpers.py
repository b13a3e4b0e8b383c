"""What the job's tests share: a small model with a real tokenizer, inputs made of lines, completions made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mpillm import spec
from mpillm.batch import requests
from mpillm.batch.requests import CheckedInput
from mpillm.batch.work import Line, Model, Work
from mpillm.engine.request import FinishedCompletion, Request
from mpillm.spec import Spec
from mpillm.store.records import Result, line_key
from mpillm.text import load_tokenizer

CHAT = Path(__file__).parent / "fixtures/models/chat"
TEXT = load_tokenizer(CHAT)
assert TEXT is not None
END = TEXT.encode("</s>", False, parse_special=True)[0]
WITH_TEXT = Model(vocab=TEXT.vocab_size, max_position=512, end_ids=frozenset({END}), text=TEXT)
WITHOUT_TEXT = Model(vocab=100, max_position=512, end_ids=frozenset({0}))


def without_tokenizer(folder: Path) -> Path:
    """The small model in `folder`, with neither a tokenizer nor a chat template."""
    for path in CHAT.iterdir():
        if path.name not in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(path, folder)
    return folder


def job(folder: Path, *overrides: str) -> Spec:
    """A job whose input and output lie in `folder`."""
    return spec.load(None, overrides, input=str(folder / "in.jsonl"), output=str(folder / "out"))


def checked(folder: Path, lines: list[Any], *overrides: str, model: Model = WITH_TEXT) -> CheckedInput:
    """The batch of an input with these lines (objects, or bytes as they are)."""
    raw = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    made = job(folder, *overrides)
    made.input_path.write_bytes(raw + b"\n")
    return requests.check(made.input_path, made, model)


def works(folder: Path, *lines: Any, model: Model = WITH_TEXT, overrides: tuple[str, ...] = ()) -> list[Work]:
    """The work of lines that are all good."""
    batch = checked(folder, list(lines), *overrides, model=model)
    assert [line.error for line in batch.lines] == [None] * len(lines)
    return list(batch.works())


def errors(
    folder: Path, *lines: Any, model: Model = WITH_TEXT, overrides: tuple[str, ...] = ()
) -> list[str | None]:
    """What is wrong with each line."""
    return [line.error for line in checked(folder, list(lines), *overrides, model=model).lines]


def completion(request: Request, tokens: list[int], seed: int = 0, **more: Any) -> FinishedCompletion:
    """A completion with made-up log-probabilities, as many as were asked for."""
    draw = np.random.default_rng(seed)

    def logprobs(count: int) -> list[float]:
        return [float(value) for value in -draw.random(count, np.float32)]

    def top(count: int, n: int) -> list[list[tuple[int, float]]]:
        return [alternatives(min(n, 60)) for _ in range(count)]  # ids that any vocabulary has

    def alternatives(n: int) -> list[tuple[int, float]]:
        return sorted(zip(draw.permutation(60)[:n].tolist(), logprobs(n), strict=True), key=lambda x: -x[1])

    prompt = len(request.prompt) - request.score_from
    if request.logprobs is not None:
        more = {"logprobs": logprobs(len(tokens)), "top": top(len(tokens), request.logprobs), **more}
    if request.prompt_logprobs is not None:
        more = {
            "prompt_logprobs": logprobs(prompt),
            "prompt_top": top(prompt, request.prompt_logprobs),
            **more,
        }
    if request.kind == "embed":
        more = {"embedding": draw.standard_normal(8).astype(np.float32), **more}
    return FinishedCompletion(
        request=request, tokens=tokens, finish_reason=more.pop("finish_reason", "length"), **more
    )


def lines(*names: str) -> list[Line]:
    """Good lines of these names; a name's content is the name."""
    return [Line(n, 0, 0, name, name.encode()) for n, name in enumerate(names, 1)]


def result(name: str, payload: bytes = b"x") -> Result:
    """A finished request of `lines`."""
    return Result(name, line_key(Line(1, 0, 0, name, name.encode())), 200, payload)
