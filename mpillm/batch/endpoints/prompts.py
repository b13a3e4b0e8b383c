"""Prompts become token ids, and are checked against the model's vocabulary, its context and the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpillm.batch.work import Model
from mpillm.errors import TOO_LONG, RequestError, UnsuitedError
from mpillm.spec import Spec
from mpillm.text import End, TooLongError, encoded_at_once
from mpillm.words import count_of

TokenIds = tuple[int, ...]
Truncated = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Side = Literal["left", "right"]  # from which a prompt is cut

# What one line may ask for: rank 0 holds all of it at once.
MAX_SEQUENCES = 4096  # prompts x n
MAX_PROMPT_TOKENS = 2**20  # the maximum of several prompts together; the context limits each of them
MAX_ANSWER = 64 * 2**20  # bytes, as estimated from what can be generated


@dataclass(frozen=True)
class Cut:
    """At most `count` tokens of a prompt: the last ones, or the first."""

    count: int
    last: bool

    def __call__(self, ids: Sequence[int], head: Sequence[int] = (), tail: Sequence[int] = ()) -> TokenIds:
        """The ids cut to the count, where `head` and `tail`, with which they begin and end, stay."""
        if len(ids) <= self.count:
            return tuple(ids)
        left = self.count - len(head) - len(tail)
        if left < 1:
            raise RequestError(
                f"truncate_prompt_tokens {self.count} leaves no room for text beside the tokenizer's special "
                "tokens"
            )
        inner = ids[len(head) : len(ids) - len(tail)]
        return (*head, *(inner[-left:] if self.last else inner[:left]), *tail)


def cut_of(asked: int | None, generated: int, side: Side, spec: Spec, model: Model) -> Cut | None:
    """Return the tokens that `truncate_prompt_tokens` allows; -1: those that `generated` tokens leave in the context.

    `side` is the one from which tokens are cut.
    """
    if asked == 0:
        raise RequestError("truncate_prompt_tokens must be -1, or 1 or more")
    if asked == -1:
        asked = max(context(spec, model) - generated, 1)
    return None if asked is None else Cut(asked, side == "left")


def read_prompts(
    key: str,
    given: str | list[Any],
    add_special: bool | None,
    n: int,
    spec: Spec,
    model: Model,
    cut: Cut | None = None,
) -> list[TokenIds]:
    """Return the prompts of a body's `key` as token ids; RequestError if `n` choices of each are too much for one line.

    Control tokens in a string are tokens: whoever writes a prompt writes the whole of what the model sees.
    """
    if isinstance(given, str):
        given = [given]
    elif not given:
        raise RequestError(f"{key} is an empty list")
    elif all(type(item) is int for item in given):
        given = [given]
    check_sequences(key, len(given), n)
    special = True if add_special is None else add_special
    ids: list[TokenIds] = []
    total = 0
    for index, item in enumerate(given):
        which = f"{key}[{index}]" if len(given) > 1 else key
        if isinstance(item, str):
            if model.text is None:
                raise UnsuitedError(
                    f"{which} is a string and the model has no tokenizer; give token ids, or put its "
                    "tokenizer.json beside it"
                )
            encode = partial(model.text.encode, item, special, True)
            around = model.text.around if special else ([], [])
            ids.append(encoded(encode, prompt_name(given, index), spec, model, cut, around))
        elif isinstance(item, list) and all(type(token) is int for token in item):
            if item and not 0 <= min(item) <= max(item) < model.vocab:
                at = next(at for at, token in enumerate(item) if not 0 <= token < model.vocab)
                raise RequestError(
                    f"{which}[{at}]: the token id {item[at]} is not in the vocabulary (0 to {model.vocab - 1})"
                )
            ids.append(tuple(item) if cut is None else cut(item))
        else:
            raise RequestError(
                f"{key} must be a string, a list of strings, a list of token ids, or a list of such lists"
            )
        total += len(ids[-1])
        if index and total > MAX_PROMPT_TOKENS:
            raise RequestError(f"{key} has more than {MAX_PROMPT_TOKENS} tokens; split the line")
    return ids


def check_sequences(key: str, prompts: int, n: int) -> None:
    """Raise RequestError if `n` choices of each of `prompts` prompts are more than a line may ask for."""
    if prompts * n > MAX_SEQUENCES:
        what = f"{key} has {count_of(prompts, 'prompt')}" + (f" and n is {n}" if n > 1 else "")
        raise RequestError(
            f"{what}: {prompts * n} sequences, but the maximum of a line is {MAX_SEQUENCES}; split the line"
        )


def check_answer(nbytes: int) -> None:
    """Raise RequestError if an answer of `nbytes` bytes, an estimate, is more than a line may ask for."""
    if nbytes > MAX_ANSWER:
        raise RequestError(
            f"its answer may take {nbytes >> 20} MiB; the maximum is {MAX_ANSWER >> 20} MiB. Split the "
            "line, or ask for fewer choices, tokens or log-probabilities"
        )


def encoded(
    encode: Callable[..., list[int]],
    which: str,
    spec: Spec,
    model: Model,
    cut: Cut | None = None,
    around: tuple[list[int], list[int]] = ([], []),
) -> TokenIds:
    """Return the token ids that `encode` returns, cut between those that stand `around`.

    It is told how many there may be, as `max_tokens`; or which `end` of the text is enough for what the cut leaves.
    A tokenizer may have tokens for which the model has no embedding: they were added to one and not to the other.
    """
    try:
        if cut is None or cut.count > context(spec, model):
            ids = tuple(encode(max_tokens=context(spec, model)))
        else:
            ids = cut(encode(end=End(encoded_at_once(cut.count), cut.last)), *around)
    except TooLongError as error:
        raise _too_long(which, str(error), spec, model) from None
    largest = max(ids, default=0)
    if largest >= model.vocab:
        text = model.text.token_text(largest) if model.text else ""
        raise RequestError(
            f"{which} has the token {text[:60]!r} (id {largest}), for which the model has no embedding "
            f"(its ids are 0 to {model.vocab - 1})"
        )
    return ids


def prompt_name(prompts: Sequence[object], index: int) -> str:
    """Return the name of one of the prompts in messages."""
    return f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"


def check_length(ids: TokenIds, which: str, spec: Spec, model: Model) -> int:
    """Return how many tokens may follow a prompt; RequestError if it is empty or too long."""
    if not ids:
        raise RequestError(f"{which} has no tokens")
    limit = context(spec, model)
    if len(ids) > limit:
        raise _too_long(which, count_of(len(ids), "token"), spec, model)
    check_kv(len(ids), spec, model)
    return limit - len(ids)


def max_tokens(prompt: int, asked: int | None, available: int, which: str, spec: Spec, model: Model) -> int:
    """Return the maximum number of tokens after a prompt; a number that nobody asked for is cut to `available`."""
    wanted = spec.sampling.max_tokens if asked is None else asked
    if asked is not None and asked > available:
        raise RequestError(
            f"{which} has {count_of(prompt, 'token')} and max_tokens is {asked}, more than the context of "
            f"{prompt + available}; lower max_tokens or shorten the prompt{_or_raise(spec, model)}",
            code=TOO_LONG,
        )
    if wanted and not available:
        raise RequestError(
            f"{which} has {count_of(prompt, 'token')} and fills the context; shorten it{_or_raise(spec, model)}",
            code=TOO_LONG,
        )
    return min(wanted, available)


def context(spec: Spec, model: Model) -> int:
    """Return the tokens that a prompt and its answer may have together."""
    return spec.memory.context(model.max_position)


def _or_raise(spec: Spec, model: Model) -> str:
    """Advice on a prompt that is too long; empty if the limit is the model's."""
    return "" if model.max_position <= spec.memory.max_context else " or raise memory.max_context"


def _too_long(which: str, length: str, spec: Spec, model: Model) -> RequestError:
    remedy = _or_raise(spec, model)
    why = "memory.max_context is" if remedy else "the model takes"
    return RequestError(
        f"{which} has {length} and {why} {count_of(context(spec, model), 'token')}; shorten it{remedy}",
        code=TOO_LONG,
    )


def check_kv(tokens: int, spec: Spec, model: Model) -> None:
    """Raise RequestError if `tokens` tokens do not fit into the KV cache: the request would never run."""
    if model.kv_tokens is not None and tokens > model.kv_tokens:
        raise RequestError(
            f"it needs {count_of(tokens, 'token')} x {model.kv_token_bytes} bytes = "
            f"{tokens * model.kv_token_bytes} bytes of "
            f"KV cache, but memory.kv = {spec.memory.kv} holds {model.kv_tokens} tokens; raise memory.kv"
        )
