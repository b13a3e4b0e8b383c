"""Answers as digests that were recorded once, in `recorded.json`: what is rebuilt must go on giving the same bytes.

A digest depends on the model and the requests, and on the settings that may change an answer, which its name says.
New fixtures need new digests: MPILLM_RECORD_DIGESTS=1 adds what is missing (and never changes what is there).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.engine.request import FinishedCompletion, Request

FILE = Path(__file__).with_name("recorded.json")


def recorded() -> dict[str, str]:
    """All digests, by name."""
    digests: dict[str, str] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return digests


def check(found: dict[str, str]) -> None:
    """Assert that these digests are those that were recorded."""
    known = recorded()
    if os.environ.get("MPILLM_RECORD_DIGESTS") and not found.keys() <= known.keys():
        known = {**found, **known}
        FILE.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")
    missing = sorted(found.keys() - known.keys())
    assert not missing, f"never recorded, MPILLM_RECORD_DIGESTS=1 does it: {missing}"
    changed = sorted(name for name, digest in found.items() if digest != known[name])
    assert not changed, f"other answers than before: {changed}"


def digest_of(completions: list[FinishedCompletion]) -> str:
    """A hash of all that was answered, every bit of it."""
    state = hashlib.blake2b(digest_size=12)
    for one in completions:
        assert one.request.kind != "embed" or one.embedding is not None
        values: list[Any] = [
            one.request.id, one.request.choice, one.tokens, one.finish_reason, one.stop_id,
            exactly(one.logprobs), exactly(one.prompt_logprobs),
            *([[token, exactly([value])] for token, value in row] for row in (*one.top, *one.prompt_top)),
            None if one.embedding is None else exactly(one.embedding.tolist()),
        ]  # fmt: skip
        state.update(json.dumps(values).encode() + b"\n")
    return state.hexdigest()


def exactly(values: list[float]) -> list[str]:
    """Floats in a notation that keeps every bit and depends on no library."""
    return [float(value).hex() for value in values]


def requests(vocab: int) -> list[Request]:
    """Requests of every kind, some with a shared prefix, of up to 80 tokens: over two blocks, and over any window."""
    draw = np.random.default_rng(20)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, vocab, count).tolist())

    system = ids(40)
    return [
        Request("greedy", ids(5), max_tokens=8, logprobs=2),
        Request("shared", system + ids(24), max_tokens=4, logprobs=0),
        Request("shared", system + ids(3), choice=1, max_tokens=6, temperature=1.0, logprobs=1),
        Request("score", system + ids(39), max_tokens=0, prompt_logprobs=3),
        Request("echo", ids(33), max_tokens=5, prompt_logprobs=1, logprobs=1, temperature=0.7, top_p=0.9),
        Request("penalty", ids(20), max_tokens=8, temperature=1.5, top_p=0.95, repetition_penalty=1.3, logprobs=3),
        Request("filters", ids(1), choice=1, max_tokens=8, temperature=0.8, top_k=20, min_p=0.01, seed=5),
        Request("hot", system, max_tokens=6, temperature=50.0, seed=9, logprobs=1),
        Request("stop", ids(4), max_tokens=20, temperature=2.0, stop_ids=frozenset(range(0, vocab, 9))),
        Request("mean", ids(34), kind="embed", pooling="mean"),
        Request("last", system + ids(9), kind="embed", pooling="last"),
    ]  # fmt: skip
