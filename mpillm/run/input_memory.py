"""What rank 0 keeps of an input and of the answers to it: known before a run, by what the lines ask for.

The lines are not checked and nothing is tokenized. What is found is an upper bound, and never more than what
`mpillm.batch` lets one line ask for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from mpillm.batch.endpoints.embeddings import JSON_BYTES
from mpillm.batch.endpoints.generate import LOGPROB_BYTES, MAX_LOGPROBS, TOKEN_BYTES
from mpillm.batch.endpoints.prompts import MAX_ANSWER, MAX_SEQUENCES
from mpillm.batch.requests import MAX_LINE
from mpillm.spec import Spec

LINE = 800  # bytes of what is kept of a line, of where its answer is, and by HDF5 (700 measured)
WRITTEN = 4096  # of an answer that is written to results.h5,
WRITING = 40 * 2**20  # and at most, whatever is written (30 MiB measured for 10^5 lines)
TOKEN, LOGPROB = 72, 120  # of a token and of an alternative to it, until the answer is written
COPIES = 4  # of an answer on its way to the journal


class _Body(msgspec.Struct):
    """The keys that decide how much is kept."""

    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: int | bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class _Line(_Body):
    body: _Body | None = None


def input_bytes(spec: Spec, hidden: int, sequences: int) -> int:
    """Bytes that rank 0 keeps of the input, if so many sequences run at once; 0 if there is none that can be read.

    `hidden` is the width of the model.
    """
    lines = answer = choice = largest = total = 0
    decoder = msgspec.json.Decoder(_Line)
    try:
        with Path(spec.input_path).open("rb") as file:
            while raw := file.readline(MAX_LINE):
                lines += raw.endswith(b"\n") or len(raw) < MAX_LINE
                try:
                    line = decoder.decode(raw)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    continue  # an error of that line
                count, kept, nbytes = _asked(line.body or line, spec, hidden)
                answer, choice = max(answer, nbytes), max(choice, kept)
                largest, total = max(largest, count), total + count
    except OSError:
        return 0
    at_once = min(total, sequences + largest)  # those that run, and those whose line is not finished
    written = min(WRITTEN * lines, WRITING)
    return LINE * lines + written + COPIES * min(answer, MAX_ANSWER) + at_once * choice


def _asked(body: _Body, spec: Spec, hidden: int) -> tuple[int, int, int]:
    """Choices, bytes that are kept of each, and bytes of the answer."""
    context = spec.memory.max_context
    if body.input:
        count = min(_prompts(bytes(body.input)), MAX_SEQUENCES)
        return count, 4 * hidden, count * hidden * JSON_BYTES
    count = min(_prompts(bytes(body.prompt)) * max(body.n or 1, body.best_of or 1, 1), MAX_SEQUENCES)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    tokens = min(max(spec.sampling.max_tokens if asked is None else asked, 0), context)
    prompt = min(len(bytes(body.prompt)), context) if bytes(body.prompt) else context
    logprobs = 0
    if body.logprobs is not None and body.logprobs is not False:
        alternatives = body.top_logprobs or 0 if body.logprobs is True else int(body.logprobs)
        logprobs = (tokens + (prompt if body.echo else 0)) * _each(alternatives)
    if body.prompt_logprobs is not None:
        logprobs += prompt * _each(body.prompt_logprobs)
    kept = TOKEN * tokens + LOGPROB * logprobs
    return count, kept, count * (TOKEN_BYTES * tokens + LOGPROB_BYTES * logprobs)


def _each(alternatives: int) -> int:
    """Log-probabilities for each token."""
    return 1 + min(max(alternatives, 0), MAX_LOGPROBS)


def _prompts(raw: bytes) -> int:
    """How many prompts a value of JSON holds."""
    if not raw.startswith(b"["):
        return 1
    found: list[Any] = msgspec.json.decode(raw, type=list[msgspec.Raw])
    return len(found) if found and bytes(found[0])[:1] in (b'"', b"[") else 1
