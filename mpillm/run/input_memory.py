"""What rank 0 keeps of an input and of the answers to it: known before a run, by what the lines ask for.

The lines are not checked and nothing is tokenized. What is found is an upper bound, and never more than what
`mpillm.batch` lets one line ask for.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from mpillm.batch.bodies import MAX_NAME
from mpillm.batch.endpoints.embeddings import JSON_BYTES
from mpillm.batch.endpoints.generate import LOGPROB_BYTES, MAX_LOGPROBS, TOKEN_BYTES
from mpillm.batch.endpoints.prompts import MAX_ANSWER, MAX_PROMPT_TOKENS, MAX_SEQUENCES
from mpillm.batch.rows import MAX_LINE, needs_arrow
from mpillm.batch.template import Template
from mpillm.errors import RequestError
from mpillm.run import inputs
from mpillm.spec import Spec

LINE = 700  # bytes of what is kept of a line and of where its answer is, besides its name (560 measured)
NAMES = 2  # copies of a line's name
WRITTEN = 4096  # of an answer that is written to results.h5,
WRITING = 12 * 2**20  # and at most, whatever is written (8 MiB measured for 10^6 lines)
PROMPT, TOKEN, LOGPROB = 56, 72, 120  # of a token, and of an alternative to it, until the answer is written
ARROW = 128 * 2**20  # of the library that reads Parquet, and of what it reads at once (98 MiB measured)
COPIES = 4  # of an answer on its way to the journal

# While a line is checked. What the values of a line take is bounded by the characters that JSON has between them.
SHORT = 1 << 14  # bytes of a line that takes no memory worth counting
BRACKET, COMMA, COLON = 80, 72, 240  # bytes of a list or an object, of a value in it, of a name in it
CHARACTER, TOKEN_ID = 220, 40  # of what is tokenized at once, and of each token of the line
CHUNK, CHARACTERS = (
    1 << 16,
    8,
)  # characters that are tokenized at once at least, and for each token of the context
TEMPLATE, CHAT = (
    24 * 2**20,
    16,
)  # of the process that applies the chat template, and for each byte of a chat there

_NOT_ASCII, _WIDE = re.compile(rb"[\x80-\xff]|\\u"), re.compile(rb"[\xf0-\xff]|\\u[dD]")


class _Body(msgspec.Struct):
    """The keys that decide how much is kept."""

    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()
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
    custom_id: Any = None


def input_bytes(spec: Spec, hidden: int, sequences: int) -> int:
    """Bytes that rank 0 keeps of the input, if so many sequences run at once; 0 if there is none that can be read.

    `hidden` is the width of the model.
    """
    lines = names = checking = chat = answer = choice = largest = total = 0
    context = spec.memory.max_context
    decoder = msgspec.json.Decoder(_Line)
    template = None if spec.request is None else Template(spec.request)
    try:
        with inputs.opened(spec) as file:
            while raw := file.readline(MAX_LINE):
                whole = raw.endswith(b"\n") or len(raw) < MAX_LINE
                lines += whole
                checking = max(checking, _checking(raw, context) if whole else 2 * MAX_LINE)
                try:
                    if template is not None:
                        raw = msgspec.json.encode(
                            template.line(msgspec.json.decode(raw, type=dict[str, Any]))
                        )
                        checking = max(checking, _checking(raw, context))
                    line = decoder.decode(raw)
                except (RequestError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    continue  # an error of that line
                body = line.body or line
                if body.messages:
                    chat = max(chat, TEMPLATE + CHAT * len(raw))
                if isinstance(line.custom_id, str):
                    names += NAMES * sys.getsizeof(line.custom_id[:MAX_NAME])
                count, kept, nbytes = _asked(body, spec, hidden)
                answer, choice = max(answer, nbytes), max(choice, kept)
                largest, total = max(largest, count), total + count
    except OSError:
        return 0
    at_once = min(total, sequences + largest)  # those that run, and those whose line is not finished
    written = min(WRITTEN * lines, WRITING)
    answers = COPIES * min(answer, MAX_ANSWER) + at_once * choice
    reading = ARROW if needs_arrow(spec.input_path) else 0
    return LINE * lines + names + written + max(checking, answers) + chat + reading


def lines_in(path: Path) -> int | None:
    """The number of lines of an input, blank ones included; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in iter(lambda: file.readline(MAX_LINE), b""))
    except OSError:
        return None


def _checking(raw: bytes, context: int) -> int:
    """Bytes that a line takes at most while it is checked."""
    length = len(raw)
    if length <= SHORT:
        return 0
    width = 1 if not _NOT_ASCII.search(raw) else 4 if _WIDE.search(raw) else 2  # of a character in memory
    values = BRACKET * (raw.count(b"[") + raw.count(b"{")) + COMMA * raw.count(b",") + COLON * raw.count(b":")
    tokens = TOKEN_ID * min(length, MAX_PROMPT_TOKENS)
    return (
        (2 + 3 * width) * length + values + tokens + CHARACTER * min(length, max(CHUNK, CHARACTERS * context))
    )


def _asked(body: _Body, spec: Spec, hidden: int) -> tuple[int, int, int]:
    """Choices, bytes that are kept of each, and bytes of the answer."""
    context = spec.memory.max_context
    given = body.input or body.prompt or body.messages
    prompts = _prompts(bytes(given)) if given is not body.messages else 1
    prompt = PROMPT * min(-(-len(given) // prompts), context)
    if body.choices:  # each is scored behind the whole prompt
        prompts = _prompts(bytes(body.choices))
    if body.input:
        count = min(prompts, MAX_SEQUENCES)
        return count, prompt + 4 * hidden, count * hidden * JSON_BYTES
    count = min(prompts * max(body.n or 1, body.best_of or 1, 1), MAX_SEQUENCES)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    tokens = min(max(spec.sampling.max_tokens if asked is None else asked, 0), context)
    scored = min(len(given), context)
    logprobs = 0
    if body.logprobs is not None and body.logprobs is not False:
        alternatives = body.top_logprobs or 0 if body.logprobs is True else int(body.logprobs)
        logprobs = (tokens + (scored if body.echo else 0)) * _each(alternatives)
    if body.prompt_logprobs is not None:
        logprobs += scored * _each(body.prompt_logprobs)
    kept = prompt + TOKEN * tokens + LOGPROB * logprobs
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
