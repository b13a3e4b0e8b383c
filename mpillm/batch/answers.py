"""What OpenAI's clients and vLLM's batch runner expect to read, made from the engine's completions.

Nothing here knows the time or draws a number: the same completions give the same bytes. `id` and `request_id`
come from the custom_id, and `created` is 0, because results must not differ between two runs.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mpillm.batch.work import Kind, Line, Model, Work
from mpillm.engine.sequence import Completion, TopLogprobs
from mpillm.text import IncrementalDecoder, cut_at_stop

CREATED = 0  # seconds since 1970 that every answer names as its own time
LOWEST = -9999.0  # JSON has no infinity: vLLM's lower bound for log-probabilities

_PREFIX: dict[Kind, str] = {"chat": "chatcmpl", "completion": "cmpl", "embedding": "embd"}
_OBJECT: dict[Kind, str] = {"chat": "chat.completion", "completion": "text_completion", "embedding": "list"}


def result_line(work: Work, completions: Sequence[Completion], model: Model, model_name: str) -> bytes:
    """The line of results.jsonl (without its newline) for a request that went well.

    `completions` are those of `work.requests`, in that order.
    """
    assert len(completions) == len(work.requests)
    return _line(work.custom_id, 200, _body(work, completions, model, model_name), None)


def error_line(custom_id: str, message: str, status: int = 400) -> bytes:
    """The line of results.jsonl for a request that ended in an error; `message` is one sentence."""
    kind, code = ("invalid_request_error", "bad_request") if status < 500 else ("server_error", "failed")
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return _line(custom_id, status, body, {"code": code, "message": message})


def bad_line(line: Line) -> bytes:
    """The line of results.jsonl for a line of the input that is wrong."""
    assert line.error is not None
    return error_line(line.custom_id, line.error)


def _line(custom_id: str, status: int, body: dict[str, Any], error: dict[str, str] | None) -> bytes:
    response = {"status_code": status, "request_id": f"req-{_name(custom_id)}", "body": body}
    values = {"id": f"batch-{_name(custom_id)}", "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(values)


def _name(custom_id: str) -> str:
    return hashlib.blake2b(custom_id.encode(), digest_size=12).hexdigest()


def _body(work: Work, completions: Sequence[Completion], model: Model, model_name: str) -> dict[str, Any]:
    words = Words(model, work.options.names_token_ids)
    answers = [_ANSWER[work.kind](work, completion, words) for completion in completions]
    generated = sum(len(completion.tokens) for completion in completions)
    usage = {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens + generated}
    if work.kind != "embedding":
        usage["completion_tokens"] = generated
    return {
        "id": f"{_PREFIX[work.kind]}-{_name(work.custom_id)}",
        "object": _OBJECT[work.kind],
        "created": CREATED,
        "model": model_name,
        "data" if work.kind == "embedding" else "choices": answers,
        "usage": usage,
    }


class Words:
    """Token ids as the strings an answer shows.

    Without a tokenizer, or where the line asks for it, a token is "token_id:17". A text without a tokenizer is
    such words with a space between them. A token that is no UTF-8 of its own is "bytes:\\xf0\\x9f", as OpenAI
    writes it.
    """

    def __init__(self, model: Model, names_token_ids: bool = False) -> None:
        self._text = model.text
        self._names_ids = names_token_ids or model.text is None

    def token(self, token: int) -> str:
        """One token."""
        if self._names_ids:
            return f"token_id:{token}"
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token: int) -> bytes:
        """The bytes a token stands for."""
        return f"token_id:{token}".encode() if self._text is None else self._text.token_bytes(token)

    def text(self, ids: Sequence[int], start: bool = True) -> str:
        """The text that tokens make, without special ones; `start` is False where it goes on from a prompt."""
        if self._text is None:
            return " ".join(self.pieces(ids))
        return self._text.decode(ids, start=start)

    def pieces(self, ids: Sequence[int], start: bool = True) -> Iterator[str]:
        """What each token adds to the text: nothing while a character is not complete."""
        if self._text is None:
            return map(self.token, ids)
        decoder = IncrementalDecoder(self._text, start=start)
        return map(decoder.push, ids)

    def echoed_pieces(self, ids: Sequence[int], given: str | None) -> Iterator[str]:
        """What each token of a prompt is in the echoed text: of control tokens those that `given`, its string, has."""
        if self._text is None or given is None:
            yield from self.pieces(ids)
            return
        decoder, at = IncrementalDecoder(self._text), 0
        for id in ids:
            piece = self._text.token_text(id) if self._text.is_control(id) else decoder.push(id)
            if self._text.is_control(id) and not given.startswith(piece, at):
                piece = ""  # put there by the tokenizer
            at += len(piece)
            yield piece

    @property
    def gap(self) -> str:
        """What stands between two pieces."""
        return " " if self._text is None else ""


def _chat_choice(work: Work, completion: Completion, words: Words) -> dict[str, Any]:
    text, stop_reason = _generated(work, completion, words)
    wants_logprobs = work.options.logprobs is not None
    return {
        "index": completion.request.choice,
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": _chat_logprobs(completion, words)} if wants_logprobs else None,
        "finish_reason": completion.finish_reason,
        "stop_reason": stop_reason,
        **_token_ids(work, completion),
    }


def _completion_choice(work: Work, completion: Completion, words: Words) -> dict[str, Any]:
    text, stop_reason = _generated(work, completion, words)
    prompt = _echoed(work, completion, words) if work.options.echo else ""
    gap = words.gap if prompt and text else ""
    wants_logprobs = work.options.logprobs is not None
    return {
        "index": completion.request.choice,
        "text": f"{prompt}{gap}{text}",
        "logprobs": _completion_logprobs(work, completion, words, prompt + gap, text)
        if wants_logprobs
        else None,
        "finish_reason": completion.finish_reason,
        "stop_reason": stop_reason,
        **_token_ids(work, completion),
    }


def _embedding(work: Work, completion: Completion, words: Words) -> dict[str, Any]:
    assert completion.embedding is not None
    vector = normalized(completion.embedding) if work.options.normalize else completion.embedding
    little_endian = np.ascontiguousarray(vector, "<f4")
    shown = (
        base64.b64encode(little_endian.tobytes()).decode() if work.options.base64 else little_endian.tolist()
    )
    return {"object": "embedding", "index": completion.request.choice, "embedding": shown}


def normalized(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vector at length 1 (a zero vector as it is); the sum is exactly rounded, so it is the same everywhere."""
    length = math.sqrt(math.fsum(float(value) ** 2 for value in vector))
    return vector if length == 0.0 else (vector.astype(np.float64) / length).astype(np.float32)


def _generated(work: Work, completion: Completion, words: Words) -> tuple[str, str | int | None]:
    """The generated text up to its stop, and what stopped it: a stop string, the line's own stop id, or neither."""
    start = work.kind == "chat"
    if completion.stop_id is not None:
        reason = completion.stop_id if completion.stop_id in work.options.stop_token_ids else None
        return words.text(completion.tokens[:-1], start), reason
    text = words.text(completion.tokens, start)
    if completion.finish_reason == "length":
        return text, None
    kept, _ = cut_at_stop(text, work.options.stop)
    rest = text[len(kept) :]
    return kept, min((stop for stop in work.options.stop if rest.startswith(stop)), key=len, default=None)


def _echoed(work: Work, completion: Completion, words: Words) -> str:
    given = _given(work, completion)
    return words.text(completion.request.prompt) if given is None else given


def _given(work: Work, completion: Completion) -> str | None:
    """The prompt as the string that it came as, None if as token ids."""
    return work.options.echo_texts[completion.request.choice // work.options.n]


def _token_ids(work: Work, completion: Completion) -> dict[str, Any]:
    if not work.options.return_token_ids:
        return {}
    return {"token_ids": completion.tokens, "prompt_token_ids": completion.request.prompt}


def _chat_logprobs(completion: Completion, words: Words) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": words.token(token), "logprob": _finite(logprob), "bytes": list(words.raw(token))}

    return [
        {**entry(token, logprob), "top_logprobs": [entry(*one) for one in top]}
        for token, logprob, top in zip(completion.tokens, completion.logprobs, completion.top, strict=True)
    ]


def _completion_logprobs(
    work: Work, completion: Completion, words: Words, before: str, text: str
) -> dict[str, list[Any]]:
    """Parallel lists, a token each: the prompt's first where it is echoed (the very first has no log-probability)."""
    ids = list(completion.tokens)
    logprobs: list[float | None] = [*map(_finite, completion.logprobs)]
    chosen = _with_chosen(completion.tokens, completion.logprobs, completion.top)
    tops: list[dict[str, float] | None] = [_top(one, words) for one in chosen]
    offsets = list(
        _offsets(words.pieces(ids, start=False), len(words.gap), len(before), len(before) + len(text))
    )
    if work.options.echo:
        prompt = completion.request.prompt
        scored = _with_chosen(prompt[1:], completion.prompt_logprobs, completion.prompt_top)
        ids = [*prompt, *ids]
        logprobs = [None, *map(_finite, completion.prompt_logprobs), *logprobs]
        tops = [None, *(_top(one, words) for one in scored), *tops]
        pieces = words.echoed_pieces(prompt, _given(work, completion))
        offsets = [*_offsets(pieces, len(words.gap), 0, len(before)), *offsets]
    return {
        "tokens": [words.token(token) for token in ids],
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _with_chosen(
    ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
) -> Iterator[TopLogprobs]:
    """Each token's alternatives, and the token itself where it is not among them."""
    for token, logprob, top in zip(ids, logprobs, tops, strict=True):
        yield top if any(token == other for other, _ in top) else [*top, (token, logprob)]


def _top(alternatives: TopLogprobs, words: Words) -> dict[str, float]:
    shown: dict[str, float] = {}
    for token, logprob in alternatives:  # of two tokens that look the same, the likelier stays
        shown.setdefault(words.token(token), _finite(logprob))
    return shown


def _offsets(pieces: Iterable[str], gap: int, start: int, end: int) -> Iterator[int]:
    """Where each piece begins, in characters; what a stop string cut off lies at the end."""
    for piece in pieces:
        yield min(start, end)
        start += len(piece) + gap


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST)


_ANSWER: dict[Kind, Callable[[Work, Completion, Words], dict[str, Any]]] = {
    "chat": _chat_choice,
    "completion": _completion_choice,
    "embedding": _embedding,
}
