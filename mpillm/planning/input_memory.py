"""What an input asks for, and what rank 0 keeps of it and of the answers: known before a run, by its lines.

The lines are not checked and nothing is tokenized. What is kept is an upper bound, and never more than what
`mpillm.batch` lets one line ask for; so are the blocks of the KV cache, for a text has no more tokens than bytes.
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from mpillm.batch.bodies import MAX_NAME
from mpillm.batch.endpoints.embeddings import JSON_BYTES
from mpillm.batch.endpoints.generate import LOGPROB_BYTES, MAX_LOGPROBS, TOKEN_BYTES
from mpillm.batch.endpoints.prompts import MAX_ANSWER, MAX_PROMPT_TOKENS, MAX_SEQUENCES
from mpillm.batch.order import PIECE
from mpillm.batch.rows.forms import needs_arrow
from mpillm.batch.rows.line import MAX_LINE
from mpillm.batch.template import Template
from mpillm.errors import RequestError
from mpillm.kernels import KV_BLOCK
from mpillm.model.cache_layout import blocks_for
from mpillm.planning.grammar_memory import NO_GRAMMARS, Asked, GrammarCounter, GrammarNeeds
from mpillm.spec import Spec
from mpillm.store import inputs
from mpillm.text.bounds import encoded_at_once
from mpillm.text.from_dllama import template_in
from mpillm.weights.source import Source
from mpillm.weights.text_files import text_fields, text_files, text_folder

LINE = 64  # bytes of a line and of its answer's place at most; 28 stay (see `batch.lines`)
ORDERED = 96  # of a line while its piece of the input is ordered (see `batch.order`)
NAMES = 2  # copies of a line's name
NAMED = 24 * 2**20  # bytes of all names at most: of lines that run, and of records that wait
# Of a line, and of all, in what is not sorted yet (two tables of names, 0.6 MiB each) or waits for the journal.
UNSORTED, UNSORTED_LINES = 1 << 15, 5 * 2**19
WRITTEN = 3072  # of an answer that is written to results.h5,
WRITING = 12 * 2**20  # and at most, whatever is written (9 MiB measured)
PROMPT, TOKEN, LOGPROB = 56, 72, 136  # of a token, and of an alternative to it, until the answer is written
ARROW = 128 * 2**20  # of the library for Parquet, and of what it reads or writes at once (98 MiB measured)
COPIES = 5  # of an answer on its way to the journal (4.6 measured)

# While a line is checked. What the values of a line take is bounded by the characters that JSON has between them.
SHORT = 1 << 14  # bytes of a line that takes no memory worth counting
BRACKET, COMMA, COLON = 80, 72, 240  # bytes of a list or an object, of a value in it, of a name in it
CHARACTER, TOKEN_ID = 220, 40  # of what is tokenized at once, and of each token of the line
# Bytes of the process that applies the chat template, and for each byte of a chat there.
TEMPLATE, CHAT = (
    24 * 2**20,
    16,
)

BYTES_PER_TOKEN = 4  # of a text, by an estimate
# Tokens around what a chat says: one for so many bytes of the template, FRAMING at most, and for each message.
TEMPLATE_TEXT, FRAMING, MESSAGE = 4, 512, 16
MESSAGE_JSON = 32  # bytes of a message besides what it says
SPECIAL = 4  # tokens around any other prompt

_IDS = re.compile(rb"\s*\[[\[\s]*[-0-9]")
_NOT_ASCII, _WIDE = re.compile(rb"[\x80-\xff]|\\u"), re.compile(rb"[\xf0-\xff]|\\u[dD]")


class _Body(Asked):
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


class _LineSize(_Body):
    body: _Body | None = None
    custom_id: Any = None


@dataclass(frozen=True)
class InputNeeds:
    """What an input asks for; nothing if there is none that can be read."""

    lines: int = 0
    sequences: int = 0
    prompt_tokens: int = 0  # an estimate, of all sequences
    generated_tokens: int = 0  # at most, of all sequences
    # Maximum of KV cache blocks that all sequences together fill, in one group; None if unknown.
    blocks: int | None = 0
    names: int = 0
    checking: int = 0
    chat: int = 0
    answer: int = 0  # of the largest
    choice: int = 0
    largest: int = 0  # sequences of a line
    reading: int = 0
    grammars: GrammarNeeds = NO_GRAMMARS

    @property
    def rows(self) -> int:
        """Tokens that a step can have at most, however large it may be."""
        return KV_BLOCK * self.blocks if self.lines and self.blocks is not None else sys.maxsize

    def kept(self, sequences: int) -> int:
        """Bytes that rank 0 keeps, if so many sequences run at once."""
        # Requests that run, and those whose line is not finished.
        at_once = min(self.sequences, sequences + self.largest)
        answers = COPIES * min(self.answer, MAX_ANSWER) + at_once * self.choice
        kept = line_bytes(self.lines) + min(self.names, NAMED) + min(WRITTEN * self.lines, WRITING)
        return kept + max(self.checking, answers) + self.chat + self.reading + self.grammars.kept(at_once)


def input_needs(spec: Spec, hidden: int, template_bytes: int = 0) -> InputNeeds:
    """What the input asks for. `hidden` is the width of the model, `template_bytes` the length of its chat template."""
    lines = names = checking = chat = answer = choice = largest = total = prompt_tokens = generated = 0
    blocks: int | None = 0
    context = spec.memory.max_context
    decoder = msgspec.json.Decoder(_LineSize)
    template = None if spec.request is None else Template(spec.request)
    grammars = GrammarCounter(spec)
    try:
        with inputs.opened(spec) as file:
            while raw := file.readline(MAX_LINE):
                whole = raw.endswith(b"\n") or len(raw) < MAX_LINE
                lines += whole
                checking = max(checking, checking_bytes(raw, context) if whole else 2 * MAX_LINE)
                try:
                    if template is not None:
                        raw = msgspec.json.encode(
                            template.line(msgspec.json.decode(raw, type=dict[str, Any]))
                        )
                        checking = max(checking, checking_bytes(raw, context))
                    line = decoder.decode(raw)
                except (RequestError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    continue  # an error of that line
                body = line.body or line
                if body.messages:
                    chat = max(chat, TEMPLATE + CHAT * len(raw))
                if isinstance(line.custom_id, str):
                    names += NAMES * sys.getsizeof(line.custom_id[:MAX_NAME])
                grammars.add(body)
                count, kept, nbytes = _asked(body, spec, hidden)
                answer, choice = max(answer, nbytes), max(choice, kept)
                largest, total = max(largest, count), total + count
                likely, most, new = _tokens(body, spec, count, template_bytes)
                prompt_tokens, generated = prompt_tokens + likely, generated + new
                blocks = (
                    None if blocks is None or most is None else blocks + _blocks(most + new, count, context)
                )
    except OSError:
        return InputNeeds()
    return InputNeeds(
        lines, total, prompt_tokens, generated, blocks, names, checking, chat, answer, choice, largest,
        ARROW if needs_arrow(spec.input_path) or spec.output.format == "parquet" else 0,
        grammars.needs(),
    )  # fmt: skip


def line_bytes(lines: int) -> int:
    """Bytes that rank 0 keeps of so many lines, besides their names."""
    return LINE * lines + ORDERED * min(lines, PIECE) + min(UNSORTED * lines, UNSORTED_LINES)


def template_length(source: Source) -> int:
    """Bytes of a model's chat template; 0 if it has none, or several."""
    folder, fields = text_folder(source.tokenizer), text_fields(source.tokenizer)
    template = None
    if fields is not None:
        template = fields.get("tokenizer.chat_template")
    elif folder is not None:
        with suppress(OSError):
            return (folder / "chat_template.jinja").stat().st_size
        with suppress(
            OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError
        ):  # loading it says why
            config = (folder / "tokenizer_config.json").read_bytes()
            template = msgspec.json.decode(config, type=dict[str, Any]).get("chat_template")
    else:
        for path in text_files(source.tokenizer):
            template = template_in(path)
    return len(template) if isinstance(template, str) else 0


def _tokens(body: _Body, spec: Spec, count: int, template_bytes: int) -> tuple[int, int | None, int]:
    """Return numbers of tokens of all sequences of a line: an estimate of the prompts, with that of choices counted
    once; the maximum of the prompts (None if unknown); and the maximum to generate."""
    given = bytes(body.input or body.prompt or body.messages)
    new = 0 if body.input else count * _new_tokens(body, spec)
    if not given:
        return 0, None, new
    if body.messages:
        length = len(given) + 2 * len(body.tools)  # templates may write them with more spaces
        # Little of a template becomes text, but it may hold a system prompt.
        messages = max(given.count(b'"role"'), 1)
        framing = min(template_bytes // TEMPLATE_TEXT, FRAMING) + MESSAGE * messages
        text = max(len(given) - MESSAGE_JSON * messages, 0) // BYTES_PER_TOKEN
        likely = text + min(template_bytes // (3 * TEMPLATE_TEXT), FRAMING) + MESSAGE // 2 * messages
        return likely, count * (length + framing), new
    prompts = _prompts(given)
    copies = -(-count // prompts)  # of each prompt
    if _IDS.match(given):
        ids = given.count(b",") + 1
        return ids, copies * ids, new
    framing = SPECIAL * prompts
    most = copies * (len(given) + framing)
    if body.choices:  # each is scored behind the whole prompt
        return count * len(given) // BYTES_PER_TOKEN + framing, most + len(body.choices), new
    return len(given) // BYTES_PER_TOKEN + framing, most, new


def _blocks(tokens: int, count: int, context: int) -> int:
    """Blocks of so many sequences of so many tokens together, each of them of `context` tokens at most."""
    return min(tokens // KV_BLOCK + count, count * blocks_for(context))


def _new_tokens(body: _Body, spec: Spec) -> int:
    """That are generated for a sequence, at most."""
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return min(max(spec.sampling.max_tokens if asked is None else asked, 0), spec.memory.max_context)


def checking_bytes(raw: bytes, context: int) -> int:
    """Bytes that a line takes at most while it is checked."""
    length = len(raw)
    if length <= SHORT:
        return 0
    width = 1 if not _NOT_ASCII.search(raw) else 4 if _WIDE.search(raw) else 2  # of a character in memory
    values = BRACKET * (raw.count(b"[") + raw.count(b"{")) + COMMA * raw.count(b",") + COLON * raw.count(b":")
    tokens = TOKEN_ID * min(length, MAX_PROMPT_TOKENS)
    return (2 + 3 * width) * length + values + tokens + CHARACTER * min(length, encoded_at_once(context))


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
    tokens = _new_tokens(body, spec)
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
