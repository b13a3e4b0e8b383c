"""From reference values to requests, and from completions to what the tests assert: for one rank or many."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillm.engine.request import FinishedCompletion, Request


@dataclass(frozen=True)
class Bounds:
    """How near a log-probability must come (all of them, and on average), and an embedding's number."""

    maximum: float
    mean: float
    embedding: float
    margin: float  # greedy tokens are compared up to the first that led the next best by less


# The engine in float32 throughout, and with quantised activations: measured on these models with a NumPy decoder that
# quantises activations alike, mean 0.04 to 0.06, single tokens up to 0.7 (where another expert is chosen).
EXACT = Bounds(maximum=2e-4, mean=2e-5, embedding=1e-4, margin=0.0)
# Models with a state: over 500 tokens float32 leaves transformers as far from float64 as it leaves this decoder.
RECURRENT = Bounds(maximum=1e-3, mean=2e-5, embedding=1e-4, margin=0.0)
RECURRENT_MODELS = (
    "qwen3_next", "qwen3next", "qwen35", "lfm2", "granite_hybrid", "granitehybrid", "bamba", "falcon_h1", "nemotron_h",
    "mamba2",
)  # fmt: skip
# The tiny ones with experts are chaotic: with Q8_0 between shards log-probabilities are off by 0.29 on average, by 8 at
# most, though every layout is exact with float32. What holds those answers are their digests.
ROUGH = Bounds(maximum=12.0, mean=0.4, embedding=5.0, margin=12.0)
QUANTIZED = Bounds(maximum=1.5, mean=0.1, embedding=0.6, margin=1.0)
# Of two experts that are nearly equal, quantised activations choose the other: PhiMoE's router leaves out all but the
# best ones, and 6 of 105 tokens of the small Mixtral are close (the median error is 0.019 all the same).
SPARSE_MODELS = ("phimoe", "mixtral_window", "exaone_moe")
SPARSE = Bounds(maximum=3.0, mean=0.2, embedding=0.6, margin=1.0)
# With BF16 weights activations are rounded to BF16, each by at most 2**-9 of itself. The NumPy decoder that rounds
# alike differs from transformers in float32 by 0.016 on average, and by 0.07 at most.
ROUNDED = Bounds(maximum=0.2, mean=0.03, embedding=0.1, margin=0.2)


def bounds_of(name: str, quantized: bool) -> Bounds:
    """What a model's values are held to: `quantized` are its weights, or what travels between ranks."""
    quantized = quantized or name.endswith("mxfp4")
    if name.startswith(RECURRENT_MODELS):
        return ROUGH if quantized else RECURRENT
    if quantized:
        return SPARSE if name in SPARSE_MODELS else QUANTIZED
    return ROUNDED if "bf16" in name else EXACT


def requests_of(reference: dict[str, Any], top: int = 5) -> list[Request]:
    """All that a model's reference values can check: scores, greedy continuations, both embeddings."""
    prompts = [tuple(prompt["ids"]) for prompt in reference["prompts"]]
    requests = [
        Request(id=f"score-{i}", prompt=prompt, max_tokens=0, prompt_logprobs=top)
        for i, prompt in enumerate(prompts)
    ]
    for greedy in reference.get("greedy", ()):
        prompt, count = prompts[greedy["prompt"]], len(greedy["ids"])
        requests.append(Request(id=f"greedy-{greedy['prompt']}", prompt=prompt, max_tokens=count, logprobs=1))
    if "embedding" in reference:
        prompt = prompts[reference["embedding"]["prompt"]]
        requests.append(Request(id="embed-mean", prompt=prompt, kind="embed", pooling="mean"))
        requests.append(Request(id="embed-last", prompt=prompt, kind="embed", pooling="last"))
    return requests


def check(reference: dict[str, Any], completions: list[FinishedCompletion], bounds: Bounds) -> None:
    """Assert that completions of `requests_of(reference)` are what the reference says."""
    by_id = {completion.request.id: completion for completion in completions}
    assert len(by_id) == len(completions)
    for greedy in reference.get("greedy", ()):
        check_greedy(greedy, by_id[f"greedy-{greedy['prompt']}"], bounds)
    errors: list[float] = []
    for i, prompt in enumerate(reference["prompts"]):
        scored = by_id[f"score-{i}"]
        assert scored.tokens == []
        assert len(scored.prompt_logprobs) == len(prompt["ids"]) - 1
        errors += np.abs(np.subtract(scored.prompt_logprobs, prompt["logprobs"])).tolist()
        if bounds.margin == 0:
            check_top(prompt, scored)
    assert max(errors) < bounds.maximum, f"log-probabilities differ by up to {max(errors):.2g}"
    assert np.mean(errors) < bounds.mean, f"log-probabilities differ by {np.mean(errors):.2g} on average"
    for pooling in ("mean", "last") if "embedding" in reference else ():
        ours = by_id[f"embed-{pooling}"].embedding
        np.testing.assert_allclose(ours, reference["embedding"][pooling], atol=bounds.embedding, rtol=0)


def check_greedy(greedy: dict[str, Any], completion: FinishedCompletion, bounds: Bounds) -> None:
    """Equal tokens, as far as the reference's own lead is no matter of rounding, with near log-probabilities."""
    sure = next(
        (i for i, margin in enumerate(greedy["margins"]) if margin < bounds.margin), len(greedy["ids"])
    )
    assert completion.finish_reason == "length"
    assert len(completion.tokens) == len(greedy["ids"])
    assert completion.tokens[:sure] == greedy["ids"][:sure]
    np.testing.assert_allclose(
        completion.logprobs[:sure], greedy["logprobs"][:sure], atol=bounds.maximum, rtol=0
    )


def check_top(prompt: dict[str, Any], completion: FinishedCompletion) -> None:
    """The likeliest tokens at some positions; neighbours closer than the bound may have changed places."""
    for position, expected in prompt["top"].items():
        ours = completion.prompt_top[int(position) - 1]
        np.testing.assert_allclose([p for _, p in ours], [p for _, p in expected], atol=EXACT.maximum, rtol=0)
        values = dict(expected)
        for rank, (token, logprob) in enumerate(ours):
            if token in values:
                assert abs(logprob - values[token]) < EXACT.maximum
            else:
                assert rank == len(ours) - 1  # a tie with the first one that is not listed


def sampled(reference: dict[str, Any]) -> list[Request]:
    """Requests that draw: with every filter, with a penalty, and from the whole row (which then has to travel)."""
    prompt = tuple(reference["prompts"][1]["ids"])
    settings = [
        {"temperature": 1.0},
        {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3, "logprobs": 3},
        {"temperature": 0.8, "top_k": 20, "min_p": 0.01, "choice": 1},
        {"temperature": 50.0, "seed": 9},
    ]
    return [
        Request(f"sampled-{i}", prompt, max_tokens=8, **more)  # type: ignore[arg-type]
        for i, more in enumerate(settings)
    ]


def digest(completions: list[FinishedCompletion]) -> str:
    """A hash of every token and every bit of every number."""
    state = hashlib.blake2b(digest_size=16)
    for one in completions:
        numbers = [*one.logprobs, *one.prompt_logprobs]
        numbers += [value for row in (*one.top, *one.prompt_top) for pair in row for value in pair]
        state.update(repr((one.request.id, one.tokens, one.finish_reason)).encode())
        state.update(np.array(numbers, np.float64).tobytes())
        state.update(b"" if one.embedding is None else one.embedding.tobytes())
    return state.hexdigest()
