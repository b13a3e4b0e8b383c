"""Read from the body of a line how many prompts it has, how long they are, and which have the same beginning."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import msgspec

from mpillm.kernels import KV_BLOCK
from mpillm.planning.grammar_memory import Asked
from mpillm.planning.token_count import IDS, Tokens
from mpillm.spec import SamplingSection

TOLD_APART = 1 << 16  # different first blocks of prompts of ids that are told apart
LONG = 4096  # prompts of LONG tokens and more are counted together

# Keys that may change the logits from which tokens are drawn.
ADJUSTS = re.compile(
    rb'"(?:logit_bias|bad_words|min_tokens|allowed_token_ids|\w+_penalty|response_format|structured_outputs|guided_\w+'
    rb'|tools)"'
)


class Body(Asked):
    """The keys of a body that determine how much memory its line takes."""

    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    queries: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    items: msgspec.Raw = msgspec.Raw()
    text_1: msgspec.Raw = msgspec.Raw()
    text_2: msgspec.Raw = msgspec.Raw()
    data_1: msgspec.Raw = msgspec.Raw()
    data_2: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()
    choices: msgspec.Raw = msgspec.Raw()
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: int | bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class LineSize(Body):
    body: Body | None = None
    custom_id: Any = None


def prompts_in(raw: bytes) -> int:
    """Return the number of prompts in a JSON value."""
    if not raw.startswith(b"["):
        return 1
    found: list[Any] = msgspec.json.decode(raw, type=list[msgspec.Raw])
    return len(found) if found and bytes(found[0])[:1] in (b'"', b"[") else 1


def lengths(body: Body, count: int, prompts: Tokens) -> Counter[int]:
    """Lower bounds of the tokens that are computed of a line's prompts, with the number of prompts for each.

    The bound of a chat is half of its tokens, because templates leave some out.
    """
    given = bytes(body.input or body.prompt)
    if body.choices:  # they are computed after their prompt, one after the other
        found = Counter({prompts.likely // count: count})
    elif len(prompts.texts) == count and not body.messages:
        found = Counter(prompts.own)
    elif count == 1:
        found = Counter([(prompts.likely - prompts.shared) // 2])
    elif not IDS.match(given) or prompts_in(given) != count:  # texts, or choices that share a prompt
        found = Counter({1: count})
    else:
        found = Counter(
            bytes(one).count(b",") + 1 for one in msgspec.json.decode(given, type=list[msgspec.Raw])
        )
    bounded = Counter[int]()
    for tokens, number in found.items():
        bounded[min(max(tokens, 1), LONG)] += number
    return bounded


def alike(body: Body, count: int, prompts: Tokens, begun: set[int]) -> int:
    """Return the number of a line's sequences whose first block may be that of an earlier sequence.

    `begun` has the hashes of the first blocks of earlier prompts of ids; those of this line are added.
    """
    given = bytes(body.input or body.prompt)
    if not IDS.match(given):
        counted = bool(prompts.texts) and not body.messages
        return count - len(prompts.texts) + prompts.alike if counted else count
    lists = prompts_in(given) > 1 or given.replace(b" ", b"").startswith(b"[[")
    several = list(map(bytes, msgspec.json.decode(given, type=list[msgspec.Raw]))) if lists else [given]
    found = 0
    for ids in several:
        first = ids.strip(b" []").split(b",", KV_BLOCK)
        if len(first) > KV_BLOCK:  # the last token of a prompt is always computed
            key = hash(tuple(map(bytes.strip, first[:KV_BLOCK])))
            new = key not in begun and len(begun) < TOLD_APART
            found += -(-count // len(several)) - new
            begun.update([key] if new else [])
    return found


def adjusts(sampling: SamplingSection) -> bool:
    """Return whether a job changes the logits from which tokens are drawn."""
    penalties = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    return bool(penalties or sampling.response_format or sampling.structured_outputs)
