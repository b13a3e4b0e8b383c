"""From a checked body to the engine's requests: prompts become token ids, settings get the job's defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mpillm.batch.bodies import Body, Chat, Completion, Embedding, Generate
from mpillm.engine.sequence import Request
from mpillm.errors import RequestError
from mpillm.spec import Spec
from mpillm.text import StopWatch, Tokenizer, TooLongError

Kind = Literal["chat", "completion", "embedding"]
TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What of the model (and of the memory it gets) decides whether a request can run."""

    vocab: int
    max_position: int
    end_ids: frozenset[int] = frozenset()  # end of sequence and of turn
    kv_tokens: int | None = None  # tokens that the KV cache's budget holds, None if not known
    kv_token_bytes: int = 0  # of one token on one rank
    text: Tokenizer | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """Where a line is, what it is called, and what is wrong with it (None if nothing)."""

    number: int  # from 1
    offset: int  # bytes
    length: int  # bytes
    custom_id: str
    digest: bytes  # of the content, 16 bytes
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What a line asks of its answer."""

    prompts: int = 1
    n: int = 1  # choices for each prompt
    echo: bool = False
    echo_texts: tuple[str | None, ...] = ()  # the prompts as they came, None for one of token ids
    logprobs: int | None = None  # of the chosen tokens, and how many alternatives
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    return_token_ids: bool = False
    names_token_ids: bool = False  # tokens are written "token_id:17"
    base64: bool = False
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class Work:
    """One line of the input, ready to run: a request for each choice of its answer, prompt by prompt."""

    line: Line
    kind: Kind
    options: Options
    requests: tuple[Request, ...]

    @property
    def custom_id(self) -> str:
        return self.line.custom_id

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once, however many choices it has."""
        return sum(len(request.prompt) for request in self.requests[:: self.options.n])


def make_work(line: Line, body: Body, spec: Spec, model: Model) -> Work:
    """Return a line's work; RequestError if the model cannot do it."""
    if isinstance(body, Chat):
        return _chat(line, body, spec, model)
    if isinstance(body, Completion):
        return _completion(line, body, spec, model)
    assert isinstance(body, Embedding)
    return _embedding(line, body, spec, model)


def _chat(line: Line, body: Chat, spec: Spec, model: Model) -> Work:
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true")
    if model.text is None:
        raise RequestError("the model has no tokenizer; give token ids as the prompt of /v1/completions")
    if not model.text.has_chat:
        raise RequestError("the model has no chat template; use a prompt with /v1/completions")
    text, messages = model.text, _messages(body.messages)
    ids = _encoded(
        lambda limit: text.encode_chat(messages, body.chat_template_kwargs, limit), "the prompt", spec, model
    )
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options = _options(body, spec, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    requests = _requests(line, [ids], asked, body, options, spec, model)
    if requests[0].max_tokens == 0:
        raise RequestError("max_tokens: 0 generates nothing; scoring is for /v1/completions with echo: true")
    return Work(line, "chat", options, requests)


def _completion(line: Line, body: Completion, spec: Spec, model: Model) -> Work:
    prompts, texts = _prompts("prompt", body.prompt, body.add_special_tokens, spec, model)
    echo = bool(body.echo)
    options = _options(
        body, spec, logprobs=body.logprobs, prompts=len(prompts), echo=echo, echo_texts=texts if echo else ()
    )
    requests = _requests(line, prompts, body.max_tokens, body, options, spec, model)
    if requests[0].max_tokens == 0 and not echo:
        raise RequestError("max_tokens: 0 generates nothing; add echo: true to score the prompt")
    return Work(line, "completion", options, requests)


def _embedding(line: Line, body: Embedding, spec: Spec, model: Model) -> Work:
    prompts, _ = _prompts("input", body.input, body.add_special_tokens, spec, model)
    for index, ids in enumerate(prompts):
        _check_length(ids, _which(prompts, index), spec, model)
    pooling = body.pooling or spec.embeddings.pooling
    requests = tuple(
        Request(id=line.custom_id, prompt=ids, choice=choice, kind="embed", max_tokens=0, pooling=pooling)
        for choice, ids in enumerate(prompts)
    )
    normalize = spec.embeddings.normalize if body.normalize is None else body.normalize
    options = Options(prompts=len(prompts), base64=body.encoding_format == "base64", normalize=normalize)
    return Work(line, "embedding", options, requests)


def _options(body: Generate, spec: Spec, **more: Any) -> Options:
    stop = spec.sampling.stop if body.stop is None else body.stop
    return Options(
        n=body.n or 1,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        return_token_ids=bool(body.return_token_ids),
        names_token_ids=bool(body.return_tokens_as_token_ids),
        **more,
    )


def _requests(
    line: Line,
    prompts: Sequence[TokenIds],
    asked: int | None,
    body: Generate,
    options: Options,
    spec: Spec,
    model: Model,
) -> tuple[Request, ...]:
    """`n` requests for each prompt; `asked` is the line's own max_tokens, None if it has none."""
    settings = _settings(body, spec)
    stop_ids = _stop_ids(body, model)
    if options.stop and model.text is None:
        raise RequestError("stop strings need a tokenizer, and the model has none; use stop_token_ids")
    requests: list[Request] = []
    for index, ids in enumerate(prompts):
        room = _check_length(ids, _which(prompts, index), spec, model)
        max_tokens = _max_tokens(len(ids), asked, room, _which(prompts, index), spec, model)
        _check_kv(len(ids) + max(max_tokens - 1, 0), spec, model)
        requests += [
            Request(
                id=line.custom_id,
                prompt=ids,
                choice=len(requests) + choice,
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                logprobs=options.logprobs,
                prompt_logprobs=options.logprobs if options.echo else None,
                watch=_watch(body, options, model),
                **settings,
            )
            for choice in range(options.n)
        ]
    return tuple(requests)


def _watch(body: Generate, options: Options, model: Model) -> StopWatch | None:
    if not options.stop or model.text is None:
        return None
    return StopWatch(model.text, options.stop, start=isinstance(body, Chat))


def _settings(body: Generate, spec: Spec) -> dict[str, Any]:
    """The line's own sampling settings, the job's where it has none."""
    keys = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    own = {key: getattr(body, key) for key in keys}
    settings = {key: getattr(spec.sampling, key) if value is None else value for key, value in own.items()}
    settings["top_k"] = max(settings["top_k"], 0)  # -1 means all, as 0 does
    return settings


def _stop_ids(body: Generate, model: Model) -> frozenset[int]:
    for token in body.stop_token_ids or ():
        _check_token(token, "the stop token id", model)
    ends = frozenset() if body.ignore_eos else model.end_ids
    return ends | frozenset(body.stop_token_ids or ())


def _check_length(ids: TokenIds, which: str, spec: Spec, model: Model) -> int:
    """Return how many tokens may follow a prompt; RequestError if it is empty or too long."""
    if not ids:
        raise RequestError(f"{which} has no tokens")
    limit = _context(spec, model)
    if len(ids) > limit:
        raise _too_long(which, f"{len(ids)} tokens", spec, model)
    _check_kv(len(ids), spec, model)
    return limit - len(ids)


def _context(spec: Spec, model: Model) -> int:
    """The tokens that a prompt and its answer may have together."""
    return min(spec.memory.max_context, model.max_position)


def _or_raise(spec: Spec, model: Model) -> str:
    """What else can be done about a long prompt: nothing where the limit is the model's."""
    return "" if model.max_position <= spec.memory.max_context else " or raise memory.max_context"


def _too_long(which: str, length: str, spec: Spec, model: Model) -> RequestError:
    remedy = _or_raise(spec, model)
    why = "memory.max_context is" if remedy else "the model takes"
    return RequestError(f"{which} has {length} and {why} {_context(spec, model)}; shorten it{remedy}")


def _encoded(encode: Callable[[int], list[int]], which: str, spec: Spec, model: Model) -> TokenIds:
    """What `encode` returns, which is told how many tokens there may be."""
    try:
        return tuple(encode(_context(spec, model)))
    except TooLongError as error:
        raise _too_long(which, str(error), spec, model) from None


def _max_tokens(prompt: int, asked: int | None, room: int, which: str, spec: Spec, model: Model) -> int:
    """How many tokens a prompt may be followed by; what nobody asked for is cut to the room there is."""
    default = spec.sampling.max_tokens
    wanted = default if asked is None else asked
    if asked is not None and asked > room:
        raise RequestError(
            f"{which} has {prompt} tokens and max_tokens is {asked}, more than the context of {prompt + room}; "
            f"shorten one of them{_or_raise(spec, model)}"
        )
    if wanted and not room:
        raise RequestError(
            f"{which} has {prompt} tokens and fills the context; shorten it{_or_raise(spec, model)}"
        )
    return min(wanted, room)


def _check_kv(tokens: int, spec: Spec, model: Model) -> None:
    """A request that does not fit into the KV cache alone will never run."""
    if model.kv_tokens is not None and tokens > model.kv_tokens:
        raise RequestError(
            f"it needs {tokens} tokens x {model.kv_token_bytes} bytes = {tokens * model.kv_token_bytes} bytes of "
            f"KV cache and memory.kv = {spec.memory.kv} holds {model.kv_tokens} tokens; raise memory.kv"
        )


def _prompts(
    key: str, given: str | list[Any], add_special: bool | None, spec: Spec, model: Model
) -> tuple[list[TokenIds], tuple[str | None, ...]]:
    """The prompts as token ids, and as the strings they came as (None for token ids).

    Control tokens in a string are tokens: whoever writes a prompt writes the whole of what the model sees.
    """
    if isinstance(given, str):
        given = [given]
    elif not given:
        raise RequestError(f"{key} is an empty list")
    elif all(type(item) is int for item in given):
        given = [given]
    special = True if add_special is None else add_special
    ids: list[TokenIds] = []
    for index, item in enumerate(given):
        which = f"{key}[{index}]" if len(given) > 1 else key
        if isinstance(item, str):
            if model.text is None:
                raise RequestError(f"{which} is a string and the model has no tokenizer; give token ids")
            encode = partial(model.text.encode, item, special, True)
            ids.append(_encoded(encode, _which(given, index), spec, model))
        elif isinstance(item, list) and all(type(token) is int for token in item):
            for position, token in enumerate(item):
                _check_token(token, f"the token id at {which}[{position}],", model)
            ids.append(tuple(item))
        else:
            raise RequestError(
                f"{key} must be a string, a list of strings, a list of token ids, or a list of such lists"
            )
    return ids, tuple(item if isinstance(item, str) else None for item in given)


def _check_token(token: int, which: str, model: Model) -> None:
    if not 0 <= token < model.vocab:
        comma = "," if which.endswith(",") else ""
        raise RequestError(f"{which} {token}{comma} is not in the vocabulary (0 to {model.vocab - 1})")


def _which(prompts: Sequence[object], index: int) -> str:
    return f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose contents are strings, lists of text parts or null."""
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where} needs a role such as 'user'")
    for key in ("tool_calls", "function_call", "audio"):
        if message.get(key):
            raise RequestError(f"{where}.{key} is not supported")
    if "content" not in message and message["role"] == "assistant":
        return {**message, "content": ""}
    content = message.get("content", ...)
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    elif not (content is None or isinstance(content, str)):
        raise RequestError(f"{where}.content must be a string or a list of text parts")
    return {**message, "content": content}


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind, text = (
        (part.get("type"), part.get("text")) if isinstance(part, dict) else (type(part).__name__, None)
    )
    if kind == "text" and isinstance(text, str):
        return dict(part)
    raise RequestError(f"{where} is of type {str(kind)[:60]!r}; only text is supported")
