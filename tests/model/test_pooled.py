"""Models that classify or make vectors against transformers: alone, under a small budget, and in any batch."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest

from mpillm.model.embedding import embedding_settings
from mpillm.model.opening import config_of, open_source
from mpillm.partition.grid import Place
from mpillm.weights.paging.weights import minimum_budget
from mpillm.weights.source import rank_plans
from tests.model import encoder_gguf, pooled
from tests.model.engine_harness import run_engine


@pytest.mark.parametrize("name", pooled.NAMES)
def test_pooled_states_and_logits(name: str) -> None:
    model, prompts = pooled.FOLDER / name, pooled.golden(name)
    requests = pooled.requests_of(prompts)
    exact = {"activations": "f32", "kv_type": "f32"}
    completions = run_engine(model, requests, **exact)
    pooled.check(prompts, completions, pooled.classifier_of(model))
    with closing(open_source(model)) as source:
        plans = rank_plans(config_of(source), Place(0, 1, 1), source)
    others = (
        run_engine(model, requests, **exact, weights=minimum_budget(plans)),
        run_engine(model, requests[::-1], **exact, max_num_seqs=2)[::-1],
        [run_engine(model, [request], **exact)[0] for request in requests[-3:]],
    )
    for other in others:
        assert list(map(pooled.bits, other)) == list(map(pooled.bits, completions[-len(other) :]))


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("bert_labels", gguf.PoolingType.RANK),
        ("xlm_roberta_reranker", gguf.PoolingType.RANK),
        ("nomic_bert", gguf.PoolingType.MEAN),
        ("modernbert_labels", gguf.PoolingType.RANK),
        ("modernbert_biases", gguf.PoolingType.CLS),
        ("embedding_gemma", gguf.PoolingType.MEAN),
    ],
)
def test_gguf_twins(name: str, pooling: gguf.PoolingType, tmp_path: Path) -> None:
    """Without the padding token, for which converters of RoBERTa cut no position off."""
    dense = np.random.default_rng(5).standard_normal((12, 32)).astype(np.float32)
    more = {"dense_2": dense, "dense_3": dense.T.copy()} if name == "embedding_gemma" else {}
    model, prompts = tmp_path / "model.gguf", pooled.golden(name)
    encoder_gguf.write(name, model, pooling, **more)
    if "roberta" in name:
        prompts = [prompt for prompt in prompts if 1 not in prompt["ids"]]
    completions = run_engine(model, pooled.requests_of(prompts), activations="f32", kv_type="f32")
    classifier = pooled.classifier_of(model)
    pooled.check(prompts, completions, classifier)
    with closing(open_source(model)) as source:
        config, settings = config_of(source), embedding_settings(source)
    assert config.ignored_keys == ()
    assert not config.generates
    assert len(settings.layers) == len(more)
    if classifier is None:
        assert settings.pooling == {1: "mean", 2: "cls"}[pooling]
