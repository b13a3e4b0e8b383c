"""Typed answers of `LLM`, made from records of the journal."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mpillm.errors import RequestError

if TYPE_CHECKING:
    from mpillm.store.records import Choice, Result

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]


class _Comparable:
    """Equal if all fields are, arrays by their values; the body has times of its own and does not count."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        compared = [one.name for one in fields(self) if one.compare]  # type: ignore[arg-type]
        return all(_same(getattr(self, name), getattr(other, name)) for name in compared)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer(_Comparable):
    """An answer of any kind. `body` is the body in results.jsonl, as JSON values."""

    index: int  #: number of the request within its call, from 0
    custom_id: str
    error: str | None = None  #: why there is no answer
    body: dict[str, Any] = field(repr=False, compare=False)

    def check(self) -> None:
        """Raise RequestError if the request has an error."""
        if self.error is not None:
            raise RequestError(self.error)


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion(_Comparable):
    """One generated text of a prompt."""

    text: str
    tokens: Ids = field(repr=False)  #: [tokens]
    logprobs: Floats | None = field(repr=False, default=None)  #: [tokens], natural logarithm, if requested
    finish_reason: str  #: "stop", "length" or "tool_calls"
    reasoning: str | None = None  #: the reasoning before the content, if the format of the model separates it
    #: of a chat, in the form of OpenAI's messages: `id`, and `function` with `name` and `arguments`, a JSON string
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation(Answer):
    """The generated texts of a request: `n` for each of its prompts."""

    prompt_tokens: tuple[Ids, ...] = field(repr=False, default=())  #: of each prompt
    completions: tuple[Completion, ...] = ()

    @property
    def text(self) -> str:
        """The first text; raises RequestError if the request has an error."""
        self.check()
        return self.completions[0].text


@dataclass(frozen=True, kw_only=True, eq=False)
class Score(Answer):
    """Log-probabilities of the tokens of a prompt (of the first prompt, if a request has several)."""

    tokens: Ids = field(repr=False, default_factory=lambda: np.empty(0, np.int32))  #: [tokens]
    #: [tokens - 1], of `tokens[1:]`, natural logarithm
    logprobs: Floats = field(repr=False, default_factory=lambda: np.empty(0, np.float32))

    def __repr__(self) -> str:
        told = (
            repr(self.error)
            if self.error is not None
            else f"None, tokens={len(self.tokens)}, total={self.total:.6g}"
        )
        return f"Score(index={self.index}, custom_id={self.custom_id!r}, error={told})"

    @property
    def total(self) -> float:
        """The sum of the log-probabilities; raises RequestError if the request has an error."""
        self.check()
        return float(self.logprobs.sum(dtype=np.float64))


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding(Answer):
    """The vectors of the texts of a request."""

    #: [texts, hidden]
    vectors: Floats = field(repr=False, default_factory=lambda: np.empty((0, 0), np.float32))

    def __repr__(self) -> str:
        told = repr(self.error) if self.error is not None else f"None, vectors of shape {self.vectors.shape}"
        return f"Embedding(index={self.index}, custom_id={self.custom_id!r}, error={told})"

    @property
    def vector(self) -> Floats:
        """The first vector, [hidden]; raises RequestError if the request has an error."""
        self.check()
        first: Floats = self.vectors[0]
        return first


@dataclass(frozen=True, kw_only=True, eq=False)
class Relevance(Answer):
    """The relevance of documents to a query, or to one query each."""

    #: [documents], in the order of the request; NaN for documents that `top_n` leaves out
    scores: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @property
    def ranking(self) -> list[int]:
        """Indices of the documents, the most relevant first; raises RequestError if the request has an error."""
        self.check()
        order = np.argsort(-self.scores, kind="stable")
        return [int(index) for index in order if not np.isnan(self.scores[index])]


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(Answer):
    """The labels of the texts of a request."""

    labels: tuple[str, ...] = ()  #: the most likely label of each text
    #: [texts, labels of the model]
    probabilities: NDArray[np.float64] = field(repr=False, default_factory=lambda: np.empty((0, 0)))

    @property
    def label(self) -> str:
        """The label of the first text; raises RequestError if the request has an error."""
        self.check()
        return self.labels[0]


def answer_of(index: int, result: Result) -> Answer:
    """Return the typed answer of a record; its type depends on the fields of the record."""
    body = msgspec.json.decode(result.line)["response"]["body"]
    common: dict[str, Any] = {"index": index, "custom_id": result.custom_id, "body": body}
    if result.status != 200:
        return Generation(**common, error=body["error"]["message"])
    if "results" in body:
        documents = sum("relevance" in choice.values for choice in result.choices) or len(result.prompts) - 1
        scores = np.full(documents, np.nan)
        for item in body["results"]:
            scores[item["index"]] = item["relevance_score"]
        return Relevance(**common, scores=scores)
    if "data" in body and "score" in body["data"][0]:
        return Relevance(**common, scores=np.array([item["score"] for item in body["data"]]))
    if "data" in body and "label" in body["data"][0]:
        return Classification(
            **common,
            labels=tuple(item["label"] for item in body["data"]),
            probabilities=np.array([item["probs"] for item in body["data"]]),
        )
    if "data" in body:
        return Embedding(**common, vectors=_vectors(body))
    prompts = tuple(np.frombuffer(prompt, "<i4") for prompt in result.prompts)
    if (
        scored := [
            values for choice in result.choices if (values := _row(choice, "prompt_logprobs")) is not None
        ]
    ) and not body["usage"]["completion_tokens"]:
        return Score(**common, tokens=prompts[0], logprobs=scored[0])
    completions = tuple(map(_completion, body["choices"], result.choices))
    return Generation(**common, prompt_tokens=prompts, completions=completions)


def _completion(shown: dict[str, Any], choice: Choice) -> Completion:
    message = shown.get("message", {})
    tokens = np.frombuffer(choice.values.get("tokens", b""), "<i4")
    return Completion(
        text=(message["content"] if message else shown["text"]) or "",
        tokens=tokens,
        logprobs=_row(choice, "logprobs"),
        finish_reason="tool_calls" if shown.get("finish_reason") == "tool_calls" else choice.finish_reason,
        reasoning=message.get("reasoning"),
        tool_calls=tuple(message.get("tool_calls", ())),
    )


def _row(choice: Choice, group: str) -> Floats | None:
    values = choice.values.get(group)
    return None if values is None else np.frombuffer(values, "<f4")


def _vectors(body: dict[str, Any]) -> Floats:
    rows = [
        np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
        if isinstance(item["embedding"], str)
        else np.array(item["embedding"], np.float32)
        for item in body["data"]
    ]
    return np.stack(rows)
