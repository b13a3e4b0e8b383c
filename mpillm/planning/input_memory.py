"""Read the lines of an input before a run: what they ask for, and the memory that rank 0 needs for lines and answers.

The lines are not checked. The memory is an upper bound, and at most what `mpillm.batch` lets one line ask for. The
blocks of the KV cache are an upper bound too: a text that is not tokenized has at most one token per byte
(`token_count`).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from mpillm.batch.bodies import MAX_NAME
from mpillm.batch.endpoints.embeddings import JSON_BYTES
from mpillm.batch.endpoints.generate import LOGPROB_BYTES, MAX_LOGPROBS, TOKEN_BYTES
from mpillm.batch.endpoints.prompts import MAX_PROMPT_TOKENS, MAX_SEQUENCES
from mpillm.batch.endpoints.score import PAIRS
from mpillm.batch.rows import parquet
from mpillm.batch.rows.forms import needs_arrow
from mpillm.batch.rows.line import MAX_LINE
from mpillm.batch.template import asker
from mpillm.errors import RequestError
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_for
from mpillm.planning import line_prompts
from mpillm.planning.answer_length import AnswerLengths
from mpillm.planning.grammar_memory import GrammarCounter
from mpillm.planning.input_needs import NO_INPUT, InputNeeds
from mpillm.planning.line_prompts import ADJUSTS, Body, LineSize, prompts_in
from mpillm.planning.token_count import BYTES_PER_TOKEN, IDS, NOTHING, Around, TokenCounter, Tokens
from mpillm.spec import Spec
from mpillm.store import inputs, table
from mpillm.text import Tokenizer
from mpillm.text.bounds import encoded_at_once

# The keys of the texts of rerank and score.
PAIR_KEYS = ("query", *dict.fromkeys(name for names in PAIRS for name in names))
NAMES = 2  # copies of a line's name in memory
# Bytes for a token of the prompt, for a generated token and for an alternative to a token, until the answer is written.
PROMPT, TOKEN, LOGPROB = 56, 72, 136
# Bytes of the library for Parquet (51 MiB measured), and additional bytes if it writes (75 MiB measured for both).
ARROW, TABLE = 56 * 2**20, 28 * 2**20
# Bytes of memory for each byte that the library reads at once (4.6 measured) and that it writes at once (11 measured).
READ, WRITE = 5, 12
ENVELOPE = 512  # bytes of a line of results besides the answer

# The memory for checking a line. The number of characters between the values of JSON bounds what the values take.
SHORT = 1 << 14  # lines of up to SHORT bytes are not counted
BRACKET, COMMA, COLON = 80, 72, 240  # bytes for a list or an object, for a value in it, for a name in it
CHARACTER, TOKEN_ID = 220, 40  # bytes for a character that is tokenized, and for each token of the line
# Bytes of the process that applies the chat template, and additional bytes for each byte of a chat.
TEMPLATE, CHAT = 24 * 2**20, 16

# Tokens that the template adds: one for TEMPLATE_TEXT bytes of the template, at most FRAMING; MESSAGE for each message.
TEMPLATE_TEXT, FRAMING, MESSAGE = 4, 512, 16

_STRING = re.compile(rb'"[^"]*"')  # without escapes
_NOT_ASCII, _WIDE = re.compile(rb"[\x80-\xff]|\\u"), re.compile(rb"[\xf0-\xff]|\\u[dD]")


def input_needs(
    spec: Spec,
    hidden: int,
    around: Around = NOTHING,
    load: Callable[[], Tokenizer | None] = lambda: None,
    whole_prompts: bool = False,
) -> InputNeeds:
    """Read what the input asks for; NO_INPUT if it cannot be read.

    `hidden` is the width of the model, and `load` returns its tokenizer. A model that reads `whole_prompts` at once
    shares no blocks between them.
    """
    context = spec.memory.max_context
    lines = names = checking = chat = answer = choice = largest = total = prompt_tokens = 0
    generated = longest = scored = unread = sequence = 0
    scores, prompts, most, alike = False, 0, 0, 0
    blocks: int | None = 0
    lengths, filled = Counter[int](), Counter[int]()
    begun = set[int]()  # hashes of the first blocks of prompts of ids
    adjusts = line_prompts.adjusts(spec.sampling)
    decoder = msgspec.json.Decoder(LineSize)
    asked = asker(spec)
    grammars, counter = (
        GrammarCounter(spec),
        TokenCounter(load, spec.batch.prefix_sharing and not whole_prompts),
    )
    held = AnswerLengths(spec, counter)
    try:
        with inputs.opened(spec) as file:
            while raw := file.readline(MAX_LINE):
                whole = raw.endswith(b"\n") or len(raw) < MAX_LINE
                lines += whole
                checking = max(checking, checking_bytes(raw, context) if whole else 2 * MAX_LINE)
                try:
                    if asked is not None:
                        raw = msgspec.json.encode(asked(msgspec.json.decode(raw, type=dict[str, Any])))
                        checking = max(checking, checking_bytes(raw, context))
                    line = decoder.decode(raw)
                except (RequestError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    unread += 1
                    continue
                body = line.body or line
                adjusts = adjusts or ADJUSTS.search(raw) is not None
                if around.apart and not (body.messages or body.prompt or body.input):
                    body.input = _texts_of_pairs(body)
                if body.messages:
                    chat = max(chat, TEMPLATE + CHAT * len(raw))
                if isinstance(line.custom_id, str):
                    names += NAMES * sys.getsizeof(line.custom_id[:MAX_NAME])
                grammars.add(body)
                tokens = _prompt_tokens(body, counter, around)
                count, kept, nbytes = _asked(body, spec, hidden, tokens.maximum)
                answer, choice = max(answer, nbytes), max(choice, kept)
                largest, total = max(largest, count), total + count
                likely, maximum = _of_sequences(body, count, tokens)
                allowed = 0 if body.input or body.choices else _new_tokens(body, spec)
                bound = held.most(body)
                each, drawn = min(allowed, bound.tokens), min(allowed, bound.drawn)
                new, longest = count * each, max(longest, drawn)
                lengths.update(line_prompts.lengths(body, count, tokens))
                alike += line_prompts.alike(body, count, tokens, begun)
                prompt_tokens, generated = prompt_tokens + likely, generated + new
                scored += likely * _scores(body)
                scores |= _scores(body) or bool(body.choices)
                prompts, most = prompts + (maximum or 0), most + (maximum or 0) + count * allowed
                sequence = max(sequence, tokens.maximum + allowed)
                if blocks is None or maximum is None:
                    blocks = None
                else:
                    own = _blocks(body, count, tokens, each, spec)
                    blocks += own
                    filled[own] += 1
    except OSError:
        return NO_INPUT
    return InputNeeds(
        lines, total, prompt_tokens, generated, scored, blocks, tuple(sorted(filled.items(), reverse=True)),
        tuple(sorted(lengths.items())), longest, names, checking, chat, answer, choice, largest,
        _arrow(spec, lines * (answer + ENVELOPE)),
        grammars.needs(), unread, prompts, most, sequence, scores, adjusts, alike,
    )  # fmt: skip


def _arrow(spec: Spec, results: int) -> int:
    """Return bytes for an input or a table in Parquet, with `results` bytes of results."""
    read, written = needs_arrow(spec.input_path), spec.output.format == "parquet"
    if not (read or written):
        return 0
    reading = READ * parquet.read_at_once(spec.input_path) if read else 0
    writing = TABLE + WRITE * min(results, table.BYTES) if written else 0
    return ARROW + max(reading, writing)


def _texts_of_pairs(body: Body) -> msgspec.Raw:
    """Return the texts of a line's queries and documents, each once, as a JSON list; empty if there are none."""
    texts: list[Any] = []
    for given in (getattr(body, name) for name in PAIR_KEYS):
        if given:
            value = msgspec.json.decode(given)
            texts += value if isinstance(value, list) else [value]
    texts = [text.get("text") if isinstance(text, dict) else text for text in texts]
    return msgspec.Raw(msgspec.json.encode(texts)) if texts else msgspec.Raw()


def _prompt_tokens(body: Body, counter: TokenCounter, around: Around) -> Tokens:
    """Return the tokens of all prompts of a line, with those that the model adds to them; each prompt counts once."""
    if body.messages:
        texts, messages = (
            counter.count(bytes(body.messages), chat=True),
            max(bytes(body.messages).count(b'"role"'), 1),
        )
        # Most of a template is code, but it may contain a system prompt.
        template = min(around.template // (3 * TEMPLATE_TEXT), FRAMING)
        likely = template + MESSAGE // 2 * messages
        maximum = min(around.template // TEMPLATE_TEXT, FRAMING) + MESSAGE * messages
        maximum += 2 * len(body.tools)  # the template may add spaces to the tools
        maximum += len(body.documents) + len(body.chat_template_kwargs)
        found = texts._replace(likely=texts.likely + likely, maximum=texts.maximum + maximum)
        if texts.again:  # all but the last token, which is computed in any case
            return found._replace(shared=found.likely - 1)
        # A system prompt of the template stands before the texts, so chats that begin alike share it too.
        return found._replace(shared=texts.shared + template * texts.alike)
    given = bytes(body.input or body.prompt)
    if IDS.match(given):
        return counter.count_ids(given)
    texts, prompts = counter.count(given), prompts_in(given)
    before = around.prompt if body.input else 0
    likely = texts.likely + prompts * before // BYTES_PER_TOKEN
    return texts._replace(likely=likely, maximum=texts.maximum + prompts * before)


def _of_sequences(body: Body, count: int, prompts: Tokens) -> tuple[int, int | None]:
    """Return the prompt tokens of all sequences of a line: an estimate, and the maximum (None: unknown).

    The estimate counts the prompt of several answers once.
    """
    if body.messages:
        return prompts.likely, count * prompts.maximum
    given = bytes(body.input or body.prompt)
    if not given:
        return 0, None
    maximum = -(-count // prompts_in(given)) * prompts.maximum
    if body.choices:  # each is scored behind the whole prompt
        return count * prompts.likely, maximum + len(body.choices)
    return prompts.likely, maximum


def _blocks(body: Body, count: int, prompts: Tokens, new: int, spec: Spec) -> int:
    """Estimate the full blocks of a line's sequences, with `new` tokens of each answer. A run also works with fewer.

    The last token of an answer is in no block. Prompts with the same beginning share blocks, and so do several answers
    to one prompt.
    """
    given = bytes(body.input or body.prompt)
    texts = prompts.texts if prompts.texts and not body.messages else ()
    lines = len(texts) or (1 if body.messages else min(prompts_in(given), count))
    each = texts or (-(-prompts.likely // lines),) * lines
    copies, context = -(-count // lines), blocks_for(spec.memory.max_context)
    behind = len(body.choices) // copies if body.choices else max(new - 1, 0)
    found = 0
    for tokens in each:
        # Each answer to a prompt computes the last token of it.
        prompt = min(max(tokens - 1, 0) // KV_BLOCK, context)
        whole = min((tokens + behind) // KV_BLOCK, context)
        if body.choices:
            found += whole
        else:
            found += prompt + copies * (whole - prompt) if spec.batch.prefix_sharing else copies * whole
    return max(found - prompts.shared // KV_BLOCK, 0)


def _new_tokens(body: Body, spec: Spec) -> int:
    """Return the maximum number of generated tokens of a sequence."""
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return min(max(spec.sampling.max_tokens if asked is None else asked, 0), spec.memory.max_context)


def _scores(body: Body) -> bool:
    """Return whether a body asks for log-probabilities of the prompt."""
    echoed = bool(body.echo) and body.logprobs is not None and body.logprobs is not False
    return echoed or body.prompt_logprobs is not None


def checking_bytes(raw: bytes, context: int) -> int:
    """Return the maximum bytes of memory for checking a line."""
    length = len(raw)
    if length <= SHORT:
        return 0
    # Bytes of a character in a Python string.
    width = 1 if not _NOT_ASCII.search(raw) else 4 if _WIDE.search(raw) else 2
    values = BRACKET * (raw.count(b"[") + raw.count(b"{")) + COMMA * raw.count(b",") + COLON * raw.count(b":")
    text = length if b"\\" in raw else sum(found.end() - found.start() for found in _STRING.finditer(raw))
    tokens = TOKEN_ID * min(text + raw.count(b",") + 1, MAX_PROMPT_TOKENS)
    return (2 + 3 * width) * length + values + tokens + CHARACTER * min(text, encoded_at_once(context))


def _asked(body: Body, spec: Spec, hidden: int, length: int) -> tuple[int, int, int]:
    """Return the number of choices, the bytes that are kept of each choice, and the bytes of the answer.

    `length` is the maximum number of tokens of all prompts.
    """
    context = spec.memory.max_context
    given = body.input or body.prompt or body.messages
    prompts = prompts_in(bytes(given)) if given is not body.messages else 1
    prompt = PROMPT * min(-(-length // prompts), context)
    if body.choices:  # each is scored behind the whole prompt
        prompts = prompts_in(bytes(body.choices))
    if body.input:
        count = min(prompts, MAX_SEQUENCES)
        return count, prompt + 4 * hidden, count * hidden * JSON_BYTES
    count = min(prompts * max(body.n or 1, body.best_of or 1, 1), MAX_SEQUENCES)
    tokens = _new_tokens(body, spec)
    scored = min(length, context)
    logprobs = 0
    if body.logprobs is not None and body.logprobs is not False:
        alternatives = body.top_logprobs or 0 if body.logprobs is True else int(body.logprobs)
        logprobs = (tokens + (scored if body.echo else 0)) * _each(alternatives)
    if body.prompt_logprobs is not None:
        logprobs += scored * _each(body.prompt_logprobs)
    kept = prompt + TOKEN * tokens + LOGPROB * logprobs
    return count, kept, count * (TOKEN_BYTES * tokens + LOGPROB_BYTES * logprobs)


def _each(alternatives: int) -> int:
    """Return the number of log-probabilities of each token."""
    return 1 + min(max(alternatives, 0), MAX_LOGPROBS)
