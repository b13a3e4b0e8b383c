"""Models that classify or make vectors against transformers: alone, under a small budget, and in any batch."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest

from mpillm.errors import ModelError
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


PUBLISHED = {  # keys that configurations of the authors have instead of those of transformers 5, which are left out
    "nomic_bert": (
        {
            "n_embd": 36, "n_head": 3, "n_inner": 44, "n_layer": 2, "n_positions": 8192, "vocab_size": 101,
            "activation_function": "swiglu", "layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000, "causal": False,
            "rotary_emb_fraction": 1.0, "prenorm": False, "qkv_proj_bias": False, "max_trained_positions": 2048,
        },
        ("architectures", "model_type"),
    ),
    "modernbert_labels": (
        {
            "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0,
            "position_embedding_type": "absolute", "layer_norm_eps": 1e-5,
        },
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_as_their_authors_publish_them(name: str, tmp_path: Path) -> None:
    model = shutil.copytree(pooled.FOLDER / name, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    published, kept = PUBLISHED[name]
    old = {key: config[key] for key in kept or config if key not in ("layer_types", "rope_parameters")}
    (model / "config.json").write_text(json.dumps({**old, **published}))
    prompts = pooled.golden(name)
    completions = run_engine(model, pooled.requests_of(prompts), activations="f32", kv_type="f32")
    pooled.check(prompts, completions, pooled.classifier_of(model))


def test_an_encoder_generates_no_text(tmp_path: Path) -> None:
    model = shutil.copytree(pooled.FOLDER / "bert_model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for change, words in (
        ({"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel is an encoder, which generates no text"),
        ({"is_decoder": True}, "is_decoder is True, but only encoders are supported as BertModel"),
        ({"position_embedding_type": "relative_key"}, "but only 'absolute' is supported"),
    ):
        (model / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=words):
            open_source(model)
