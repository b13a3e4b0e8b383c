"""The keys of OpenAI's and vLLM's bodies that no endpoint takes: ignored, or refused by name.

`python packaging/docs/other_keys.py` writes the lists of them in docs/requests.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mpillm.errors import RequestError


class TextPart(msgspec.Struct):
    """A part of a prediction."""

    type: Literal["text"]
    text: str


class Prediction(msgspec.Struct):
    """The text from which OpenAI's servers draft the answer."""

    type: Literal["content"]
    content: str | list[TextPart]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """The options of a server's stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None

    def __post_init__(self) -> None:
        for key in ("include_obfuscation", "continuous_usage_stats"):
            if getattr(self, key):
                raise ValueError(f"{key} true is not supported")


class Ignored(msgspec.Struct):
    """Keys that change no answer, whatever value of the right type they have."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "fast", "flex", "priority", "scale"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Literal["24h", "in-memory", "in_memory"] | None = None
    prediction: Prediction | None = None
    priority: int | None = None
    request_id: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Meta(ge=1)] | None = None
    guided_decoding_backend: str | None = None
    parallel_tool_calls: bool | None = None


IGNORED = frozenset(Ignored.__struct_fields__)

# fmt: off
# Keys that would change a result in a way that is not built: refused, unless they say what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "use_beam_search": (False,),
    "suffix": ("",),
    "length_penalty": (1,),
    "encoding_format": ("float",),
    "spaces_between_special_tokens": (True,),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "watermarking": (False,),
    "thinking_token_budget": (-1,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_mm_kwargs": (False,),
    "routed_experts_prompt_start": (0,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "padding": ("do_not_pad",),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}

REFUSED = frozenset({
    "audio", "moderation", "web_search_options", "reasoning_effort", "chat_template", "messages", "logit_processors",
    "logprob_token_ids", "repetition_detection", "prompt_embeds", "guided_whitespace_pattern", "max_tokens_per_doc",
})
# fmt: on

_INSTEAD = {
    "best_of": "; use n for several answers",
    "chat_template": "; the model's own template is used, with the variables in chat_template_kwargs. Send a text that "
    "you rendered yourself to /v1/completions",
    "functions": "; use tools",
    "function_call": "; use tool_choice",
    "guided_whitespace_pattern": "; use whitespace_pattern in structured_outputs",
    "logprob_token_ids": "; top_logprobs and logprobs give up to 1000 alternatives",
    "max_new_tokens": "; use max_tokens",
    "max_tokens_per_doc": "; use truncate_prompt_tokens",
    "messages": " here; it is a key of /v1/chat/completions and /v1/multiple_choice",
    "input": "; it is for /v1/embeddings and /v1/classify",
    "prompt": "; it is for /v1/completions, and chats have messages",
    "prompt_embeds": "; a prompt is a text or token ids",
    "stream": "; a batch returns whole answers",
}


def refuse(key: str, value: Any, body: dict[str, Any], known: Collection[str]) -> None:
    """Raise RequestError for a key that is not among the `known` ones, unless its value asks for nothing."""
    if key in NEUTRAL:
        neutral = (*NEUTRAL[key], body.get("n")) if key == "best_of" else NEUTRAL[key]
        if any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
            return
        raise RequestError(f"{key} {short(value)} is not supported{_INSTEAD.get(key, '')}", key)
    if key in REFUSED:
        raise RequestError(f"{key} is not supported{_INSTEAD.get(key, '')}", key)
    close = difflib.get_close_matches(key[:100], [*known, *NEUTRAL], n=1, cutoff=0.75)
    hint = _INSTEAD.get(key) or (f" (did you mean {close[0]!r}?)" if close else "")
    raise RequestError(f"the key {key[:100]!r} is unknown{hint}", key[:100])


def short(value: Any) -> str:
    """Return a value of JSON as a message has it."""
    text = repr(value) if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
