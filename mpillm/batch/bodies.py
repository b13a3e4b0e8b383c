"""The bodies of requests as OpenAI and vLLM define them: what is taken, what is refused, and by which name."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mpillm.errors import RequestError
from mpillm.spec import Fraction, Penalty, Pooling, Seed, Stop, Temperature, TopK, TopP, plain_words

MAX_LOGPROBS = 20
MAX_CHOICES = 1024

Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]

# Keys that change no result of ours: taken and not looked at.
# fmt: off
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "priority", "request_id", "cache_salt", "stream_options",
    "parallel_tool_calls"
})
# fmt: on

# Keys that would change a result in a way that is not built: refused, unless they say what happens anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "use_beam_search": (False,),
    "suffix": ("",),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "modalities": (["text"],),
    "bad_words": ([],),
    "documents": ([],),
}
# fmt: off
_REFUSED = frozenset({
    "prompt_logprobs", "truncate_prompt_tokens", "structured_outputs", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar", "dimensions", "logits_processors", "allowed_token_ids", "audio",
    "prediction", "reasoning_effort", "verbosity", "web_search_options", "chat_template",
    "mm_processor_kwargs", "logit_processors", "thinking_token_budget"
})
# fmt: on
_INSTEAD = {
    "prompt_logprobs": "; echo with logprobs gives them",
    "best_of": "; n gives several answers",
    "max_new_tokens": "; it is called max_tokens",
    "stream": "; a batch is answered as a whole",
}


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all three kinds take; null means the default."""

    model: str | None = None


class Generate(Body, frozen=True, kw_only=True):
    """What both kinds that generate text take; where a key is absent, the job's [sampling] holds."""

    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Fraction | None = None
    repetition_penalty: Penalty | None = None
    n: Choices | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class Chat(Generate, frozen=True, kw_only=True):
    """/v1/chat/completions"""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Completion(Generate, frozen=True, kw_only=True):
    """/v1/completions"""

    prompt: str | list[Any]
    logprobs: Logprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class Embedding(Body, frozen=True, kw_only=True):
    """/v1/embeddings"""

    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None


URLS: dict[str, type[Body]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/embeddings": Embedding,
}
_BARE: dict[str, type[Body]] = {"messages": Chat, "prompt": Completion, "input": Embedding}
_BATCH_KEYS = ("custom_id", "method", "url", "body")


def decode_line(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a line, or say why there is none (RequestError)."""
    try:
        value = msgspec.json.decode(raw)
    except UnicodeDecodeError:
        raise RequestError(f"the line is not UTF-8 text (byte {_first_bad_byte(raw)})") from None
    except RecursionError:
        raise RequestError("the line is nested too deeply") from None
    except msgspec.MsgspecError as error:
        text = str(error).removeprefix("JSON is malformed: ")
        raise RequestError(f"the line is not JSON: {text[0].lower()}{text[1:]}") from None
    if not isinstance(value, dict):
        raise RequestError('the line is no JSON object such as {"prompt": "..."}')
    return value


def _first_bad_byte(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start + 1
    return len(raw)


def custom_id_of(line: dict[str, Any]) -> str | None:
    """The line's custom_id, None if it has none; RequestError if it is no name."""
    name = line.get("custom_id")
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise RequestError("custom_id must be a string that is not empty")
    return name


def read_body(line: dict[str, Any]) -> Body:
    """Return a line's typed body; RequestError says what is wrong with the line or its body."""
    kind, body = _open(line)
    return _check(kind, body)


def _open(line: dict[str, Any]) -> tuple[type[Body], dict[str, Any]]:
    """Return which kind of request a line is, and its body; RequestError if it is none."""
    if "body" not in line and "url" not in line and "method" not in line:
        body = {key: value for key, value in line.items() if key != "custom_id"}
        kinds = [kind for key, kind in _BARE.items() if key in body]
        if len(kinds) != 1:
            raise RequestError("the line needs one of messages, prompt or input, or a url and a body")
        return kinds[0], body
    for key in line:
        if key not in _BATCH_KEYS:
            raise RequestError(f"the key {key!r} is unknown beside {', '.join(_BATCH_KEYS)}")
    if line.get("method", "POST") != "POST":
        raise RequestError(f"the method must be 'POST', not {_short(line['method'])}")
    url = line.get("url")
    if not isinstance(url, str) or url not in URLS:
        given = "there is no url" if url is None else f"the url {_short(url)} is unknown"
        raise RequestError(f"{given}; there are {', '.join(URLS)}")
    if not isinstance(line.get("body"), dict):
        raise RequestError("the body must be a JSON object")
    return URLS[url], line["body"]


def _check(kind: type[Body], body: dict[str, Any]) -> Body:
    """Return the typed body; RequestError names the first key that is wrong, unknown or not supported."""
    known = kind.__struct_fields__
    kept = {}
    for key, value in body.items():
        if key in known:
            kept[key] = value
        elif key not in IGNORED:
            _refuse(key, value, body, known)
    try:
        return msgspec.convert(kept, kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        path = place.rstrip("`").lstrip(".")
        if text.startswith("Object missing required field"):
            raise RequestError(f"the key {text.rpartition(' ')[2].strip('`')!r} is missing") from None
        raise RequestError(f"{path}: {plain_words(text)}") from None


def _refuse(key: str, value: Any, body: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise for a key that is not taken, unless its value asks for nothing."""
    if value is None and (key in _NEUTRAL or key in _REFUSED):
        return
    if key in _NEUTRAL:
        neutral = (*_NEUTRAL[key], body.get("n")) if key == "best_of" else _NEUTRAL[key]
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
            return
        raise RequestError(f"{key} {_short(value)} is not supported{_INSTEAD.get(key, '')}")
    if key in _REFUSED:
        raise RequestError(f"{key} is not supported{_INSTEAD.get(key, '')}")
    close = difflib.get_close_matches(key, [*known, *_NEUTRAL], n=1, cutoff=0.75)
    hint = _INSTEAD.get(key) or (f" (did you mean {close[0]!r}?)" if close else "")
    raise RequestError(f"the key {key[:100]!r} is unknown{hint}")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
