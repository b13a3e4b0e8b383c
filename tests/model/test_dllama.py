"""Distributed-Llama's model files: the same answers as those of their twins in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.engine.request import FinishedCompletion, Request
from tests.model.checks import EXACT, check, requests_of
from tests.model.engine_harness import run_engine
from tests.model.golden import golden, model_path
from tests.weights.build import Array, Tiny, through, write_gguf
from tests.weights.dllama_files import KINDS, convert, write_model


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen3"])
def test_float32_answers_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """As many heads of keys as of queries, scaled frequencies, norms of heads; rows that are not whole blocks of 32."""
    model = convert(model_path(name), tmp_path / "dllama_model_tiny_f32.m")
    reference = golden(name)
    check(reference, run_engine(model, requests_of(reference), activations="f32"), EXACT)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "q40"), ("llama", "f16"), ("qwen3", "q80"), ("qwen3_moe", "q40"), ("qwen3_moe", "f32")],
)
def test_answers_are_those_of_a_gguf_twin(tmp_path: Path, architecture: str, kind: str) -> None:
    """Bit for bit: the blocks are the same. Some rows are an odd number of blocks, and heads are not a power of two."""
    tiny = Tiny(
        hidden=96, n_layers=3, n_heads=6, n_kv_heads=3, head_dim=32, intermediate=160, vocab=107, seed=len(kind),
        qk_norm=architecture != "llama",
        **({"n_experts": 5, "moe_intermediate": 32} if architecture == "qwen3_moe" else {}),
    )  # fmt: skip
    stored = KINDS[kind][1].name
    twin = write_gguf(tmp_path / "twin.gguf", tiny, architecture.replace("_", ""), (stored,))
    config = tiny.config() | {"model_type": architecture, "max_position_embeddings": 512}
    if tiny.n_experts:
        config |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    weights: dict[str, Array] = dict(tiny.weights())
    name = "model.embed_tokens.weight"  # which the twin has in blocks, and the file in float32
    weights[name] = through(stored, weights[name])
    model = write_model(tmp_path / "tiny.m", config, weights, kind)

    random = np.random.default_rng(len(architecture))
    requests = [
        Request(id=str(length), prompt=tuple(random.integers(0, 107, length).tolist()), max_tokens=12, logprobs=0)
        for length in (1, 7, 40)
    ]  # fmt: skip
    expected, found = (run_engine(path, requests) for path in (twin, model))
    assert list(map(_values, found)) == list(map(_values, expected))
    assert len({token for completion in found for token in completion.tokens}) > 3


def _values(completion: FinishedCompletion) -> list[Any]:
    return [completion.tokens, completion.logprobs]
