"""The answers of Distributed-Llama itself, where MPILLM_TEST_DLLAMA names its program: the same file, the same text."""

from __future__ import annotations

import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mpillm.engine.request import Request
from mpillm.text import load_tokenizer
from tests.model.engine_harness import run_engine
from tests.weights.build import Tiny
from tests.weights.dllama_files import tokens_of, write_model, write_tokenizer

PROGRAM = os.environ.get("MPILLM_TEST_DLLAMA", "")
CHAT = Path(__file__).parents[1] / "fixtures/models/chat"
STEPS = 40
PROMPT = "the quick brown fox jumps, and what is the capital of the other country?"


def write(folder: Path, architecture: str, kind: str) -> Path:
    """A random model that says something else after each prompt, and its tokenizer; it begins texts without BOS."""
    random = np.random.default_rng(len(architecture))
    experts = {"n_experts": 6, "moe_intermediate": 128} if architecture == "qwen3_moe" else {}
    tiny = Tiny(
        hidden=256, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=32, intermediate=384, vocab=320,
        qk_norm=architecture != "llama", **experts,
    )  # fmt: skip
    weights = tiny.weights()
    for name, value in weights.items():
        drawn = random.standard_normal(value.shape)
        scale = 1.3 / value.shape[-1] ** 0.5 if value.ndim == 2 and "embed" not in name else 1.0
        weights[name] = (1 + 0.1 * drawn if value.ndim == 1 else scale * drawn).astype(np.float32)
    config = tiny.config() | {"model_type": architecture, "max_position_embeddings": 256}
    if experts:
        config |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    tokens, bos, eos = tokens_of(CHAT)
    write_tokenizer(folder / "tiny.t", tokens, bos, [eos], add_bos=False)
    return write_model(folder / "tiny.m", config, weights, kind)


def peer(mode: str, model: Path, kind: str, prompt: str, *more: str) -> str:
    """What its program prints."""
    buffers = "f32" if kind == "f32" else "q80"
    command = [
        PROGRAM,
        mode,
        "--model",
        str(model),
        "--tokenizer",
        str(model.with_suffix(".t")),
        "--prompt",
        prompt,
    ]
    command += ["--buffer-float-type", buffers, "--nthreads", "1", "--temperature", "0", *more]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(not PROGRAM, reason="MPILLM_TEST_DLLAMA names no program of Distributed-Llama")
@pytest.mark.parametrize(
    ("architecture", "kind"),  # those that its processors' kernels know
    [("llama", "f32"), ("llama", "q40"), ("qwen3", "f32"), ("qwen3", "q40"), ("qwen3_moe", "q40")],
)
def test_it_says_the_same(tmp_path: Path, architecture: str, kind: str) -> None:
    """Its log-probabilities of a text, and its greedy text after one token.

    A prompt of several tokens would not do for the latter: its `inference` does not read the last one.
    """
    model = write(tmp_path, architecture, kind)
    tokenizer = load_tokenizer(model.with_suffix(".t"))
    assert tokenizer is not None
    ids, (word,) = tokenizer.encode(PROMPT), tokenizer.encode(" the")
    scored = Request(id="scored", prompt=tuple(ids), max_tokens=0, prompt_logprobs=0)
    continued = Request(id="continued", prompt=(word,), max_tokens=STEPS)
    logprobs, greedy = run_engine(model, [scored, continued], activations="f32")

    probabilities = re.findall(r"prob=([0-9.]+)", peer("perplexity", model, kind, PROMPT))
    assert len(probabilities) == len(ids) - 1
    away = [
        abs(float(found) - math.exp(own))
        for found, own in zip(probabilities, logprobs.prompt_logprobs, strict=True)
    ]
    assert max(away) < (2e-5 if kind == "f32" else 0.02), max(away)

    printed = peer("inference", model, kind, " the", "--steps", str(STEPS))
    pieces = re.sub(r"🔶 Pred.*? kB \| ", "", printed[printed.index("🔶") : printed.rindex("Evaluation")])
    shown = [token for token in greedy.tokens if token not in (tokenizer.bos_id, tokenizer.eos_id)]
    own = letters(tokenizer.decode(shown, skip_special=False))
    same = len(own) if kind == "f32" else 3  # what follows depends on how activations are rounded
    assert len(set(own)) > 5
    assert letters(pieces)[:same] == own[:same]


def letters(text: str) -> str:
    """What is left of a text when its pieces may end within a character, and are shown as "~" then."""
    return re.sub(r"[^A-Za-z ]", "", text)
