"""The real decoder, on one rank, against transformers (and where that has no values, against the NumPy twin)."""

from __future__ import annotations

import numpy as np
import pytest

from mpillm.engine.request import Request
from tests.model.checks import EXACT, QUANTIZED, ROUNDED, bounds_of, check, requests_of
from tests.model.engine_harness import run_engine
from tests.model.golden import GGUFS, MODELS, PLAIN_GGUFS, gguf_path, golden, model_path
from tests.model.golden import QUANTIZED as QUANTIZED_MODELS
from tests.model.oracle import Oracle


@pytest.mark.parametrize("name", MODELS)
def test_safetensors(name: str) -> None:
    reference = golden(name)
    check(
        reference,
        run_engine(model_path(name), requests_of(reference), activations="f32"),
        bounds_of(name, False),
    )


@pytest.mark.parametrize("name", GGUFS)
def test_gguf(name: str) -> None:
    reference = golden(f"{name}.gguf")
    completions = run_engine(gguf_path(name), requests_of(reference), activations="f32", kv_type="f32")
    check(reference, completions, bounds_of(name, name not in PLAIN_GGUFS))


@pytest.mark.parametrize(("name", "kind"), QUANTIZED_MODELS)
def test_quantised_while_paged_in(name: str, kind: str) -> None:
    reference = golden(f"{name}.{kind}")
    requests = requests_of(reference)
    completions = run_engine(model_path(name), requests, quantize=kind, activations="f32", kv_type="f32")
    check(reference, completions, QUANTIZED)

    # Against a decoder that quantises weights and activations alike, what is left is rounding, and its consequences.
    twin = Oracle(model_path(name), quantize=kind)
    errors = []
    for request, completion in zip(requests, completions, strict=True):
        ids = list(request.prompt)
        expected = twin.logprobs(ids)[np.arange(len(ids) - 1), ids[1:]]
        errors += np.abs(np.subtract(completion.prompt_logprobs, expected)).tolist()
    # A value right between two levels may be rounded either way; BF16 weights lie so coarsely that many are.
    assert np.mean(errors) < (0.1 if name == "smol_bf16" else 0.005)


@pytest.mark.parametrize("name", ["llama_yarn", "qwen2_window", "qwen3_moe", "mistral", "smol_bf16"])
def test_prompts_of_any_length_in_one_batch(name: str) -> None:
    """Lengths around the KV block's 32 tokens and the windows, all in one run, chunked by a small token budget."""
    twin = Oracle(model_path(name))
    random = np.random.default_rng(11)
    lengths = [1, 2, 8, 9, 10, 12, 13, 31, 32, 33, 64, 65, 97]
    prompts = [random.integers(0, twin.config["vocab_size"], length).tolist() for length in lengths]
    requests = [
        Request(id=str(i), prompt=tuple(p), max_tokens=0, prompt_logprobs=0) for i, p in enumerate(prompts)
    ]
    completions = run_engine(model_path(name), requests, activations="f32", max_num_batched_tokens=24)
    errors: list[float] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = twin.logprobs(prompt)[np.arange(len(prompt) - 1), prompt[1:]]
        errors += np.abs(np.subtract(completion.prompt_logprobs, expected)).tolist()
    if name != "smol_bf16":
        assert max(errors) < EXACT.maximum
    else:  # the twin rounds activations too, but a value right between two BF16 may be rounded either way
        assert max(errors) < ROUNDED.maximum
        assert np.mean(errors) < ROUNDED.mean / 5


def test_queries_in_int8_depend_on_their_request_alone() -> None:
    """Scores of one row and of a batch are the same sums, close to those of the same cache with queries in floats."""
    requests = requests_of(golden("llama_mixed.gguf"))
    model, made = gguf_path("llama_mixed"), {}
    for type in ("q8_0", "q8_0_int8"):
        made[type] = run_engine(model, requests, kv_type=type)
    alone = [run_engine(model, [request], kv_type="q8_0_int8")[0] for request in requests]
    for one, other in zip(alone, made["q8_0_int8"], strict=True):
        assert one.tokens == other.tokens
        assert one.prompt_logprobs == other.prompt_logprobs
    errors = [
        np.abs(np.subtract(one.prompt_logprobs, other.prompt_logprobs))
        for one, other in zip(made["q8_0"], made["q8_0_int8"], strict=True)
    ]
    assert 0 < np.mean(np.concatenate(errors)) < 0.05
