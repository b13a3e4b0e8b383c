"""Configurations of published models, family by family: what they are read as, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mpillm.errors import ModelError
from mpillm.model.cache_spec import TokenCache
from mpillm.model.families import read_config
from mpillm.model.layers.attention import Tuning
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.latent import LatentAttentionSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import NormSpec
from mpillm.partition.grid import Place
from tests.model.configs import (
    KEYS,
    MODELS,
    PUBLISHED,
    SIZES,
    attention,
    experts,
    fixture,
    read,
    rope,
    windows,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_read(name: str) -> None:
    config = read_config(PUBLISHED[name])
    assert config.hidden == PUBLISHED[name]["hidden_size"]
    assert windows(config)[0] == (4096 if name == "Mistral-7B-v0.1" else 0)
    assert rope(config).kind == {
        "Llama-3.2-1B-Instruct": "llama3",
        "Qwen2.5-7B with its card's YaRN": "yarn",
        "DeepSeek-V2-Lite": "yarn",
        "DeepSeek-V3 in BF16": "yarn",
        "Kimi-K2-Instruct in BF16": "yarn",
    }.get(name, "default")


@pytest.mark.parametrize("name", KEYS)
def test_no_published_key_is_refused(name: str) -> None:
    config, raw = read_config(KEYS[name]), KEYS[name]
    assert config.hidden == (raw["n_embd"] if name == "gpt2" else raw["hidden_size"])
    assert config.architecture == raw["architectures"][0]


def test_llama4() -> None:
    config = read_config(fixture("llama4"))
    first, second = (layer.mixer for layer in config.layers[:2])
    assert (first.window, first.chunked, first.tuning, first.rotary.interleaved) == (21, True, None, True)
    assert (second.window, second.chunked, second.rotary) == (0, False, None)
    assert second.tuning == Tuning(0.3, 16, offset=1)
    assert (first.qk_norm, second.qk_norm) == (NormSpec(1e-5, weights=False), None)
    assert experts(config) == (0, 4, 0, 4)
    assert config.layers[1].mlp.scaled_input
    untuned = read_config({**fixture("llama4"), "attn_temperature_tuning": False, "use_qk_norm": False})
    assert all(layer.mixer.tuning is layer.mixer.qk_norm is None for layer in untuned.layers)
    sizes = {**SIZES, "architectures": ["Llama4ForCausalLM"]}
    scout = read_config(sizes)
    assert windows(scout) == (8192, 8192, 8192, 0)
    assert experts(scout) == (16,) * 4
    assert experts(read_config({**sizes, "moe_layers": [2]})) == (0, 0, 16, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is .*, but must be a list of 4 numbers"),
        ({"attention_chunk_size": None}, "layer_types is .*, but there is no attention_chunk_size"),
        ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning is 'yes', but must be true or false"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but the model has 4 experts"),
    ],
)
def test_llama4_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_config({**fixture("llama4"), **change})


def test_ministral() -> None:
    tuned = read_config(fixture("ministral3"))
    assert attention(tuned).tuning == Tuning(0.3, 16, offset=0)
    published = read("ministral3", head_dim=16)
    assert attention(published).tuning == Tuning(0.1, 16384, offset=0)
    assert (rope(published).kind, rope(published).attention_factor) == ("yarn", 1.0)
    untuned = read("ministral3", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert attention(untuned).tuning is None
    some = read("ministral", sliding_window=9, layer_types=["sliding_attention", "full_attention"] * 2)
    assert windows(some) == (9, 0, 9, 0)


def test_hunyuan() -> None:
    dense = read_config(fixture("hunyuan"))
    assert attention(dense).normed_after_rope
    assert rope(dense).theta == pytest.approx(1e4 * 30 ** (12 / 10))
    mixture = read_config(fixture("hunyuan_moe"))
    assert [layer.mlp.router.chosen for layer in mixture.layers] == [2, 3]
    lists = read("hunyuan_v1_moe", num_experts=[2, 3, 4, 5], moe_topk=1, moe_intermediate_size=[8] * 4)
    assert experts(lists) == (2, 3, 4, 5)
    assert lists.layers[0].mlp.width == 8


def test_gemma4() -> None:
    dense, mixture = read_config(fixture("gemma4")), read_config(fixture("gemma4_moe"))
    window, full = (layer.mixer for layer in dense.layers[:2])
    assert (window.head_dim, window.n_kv_heads, window.window, window.v_is_k) == (8, 2, 20, False)
    assert (full.head_dim, full.n_kv_heads, full.window, full.v_is_k) == (16, 1, 0, True)
    assert (window.scale, full.rotary.config.factors) == (1.0, (1.0,) * 2 + (np.inf,) * 6)
    assert (experts(mixture), mixture.layers[0].mlp.apart) == ((6, 6), NormSpec(1e-6))
    own = {key: value for key, value in fixture("gemma4").items() if key != "per_layer_config"}
    published = {**own, "global_head_dim": 16, "num_global_key_value_heads": 1}
    assert read_config(published) == dense
    same = read_config({**own, "per_layer_config": {}}).layers[1].mixer
    assert (same.head_dim, same.n_kv_heads) == (8, 2)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "gemma4_text",
            {},
            "hidden_size_per_layer_input is .*, but layers with inputs or with keys of others",
        ),
        (
            "gemma4_text",
            {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 2},
            "num_kv_shared_layers is 2",
        ),
        (
            "gemma4_text",
            {"hidden_size_per_layer_input": 0, "per_layer_config": {"0": {"head_dim": 4}}},
            "per_layer_config must say the same of all full_attention layers",
        ),
        ("hunyuan_v1_dense", {"use_cla": True}, "use_cla is True, but HunYuanDenseV1ForCausalLM"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, "moe_topk is .*, but must be a number, or 4 of them"),
        ("hunyuan_v1_moe", {"num_experts": 2, "moe_topk": 3}, "moe_topk is 3, but layer 0 has 2 experts"),
        ("hunyuan_v1_moe", {"num_shared_expert": [2] * 4}, "only one shared expert is supported"),
        ("phimoe", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, but the router always chooses 2"),
    ],
)
def test_further_families_refused(kind: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read(kind, **change)


def test_latents_of_what_is_published() -> None:
    v3 = read_config(PUBLISHED["DeepSeek-V3 in BF16"])
    mixer = v3.layers[60].mixer
    assert isinstance(mixer, LatentAttentionSpec)
    assert mixer.cache(Place(0, 1, 1), 1) == (TokenCache(1, 576, 0),)
    assert mixer.scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    assert mixer.rotary.config.attention_factor == 1
    assert [layer.mlp.count for layer in v3.layers] == [0] * 3 + [256] * 58
    router = RouterSpec(8, "sigmoid", correction=True, groups=8, groups_chosen=4, scale=2.5)
    assert v3.layers[3].mlp == ExpertsSpec(256, 2048, router, shared=MlpSpec(2048, prefix="shared_"))
    lite = read_config(PUBLISHED["DeepSeek-V2-Lite"])
    assert lite.layers[1].mlp == ExpertsSpec(
        64,
        1408,
        RouterSpec(6, group_best=1, normalise=False),
        shared=MlpSpec(2816, prefix="shared_"),
    )
    assert (lite.layers[0].mixer.q_rank, lite.layers[0].mixer.q_norm) == (0, None)
    assert read_config(PUBLISHED["Kimi-K2-Instruct in BF16"]).layers[1].mlp.count == 384
    flash = read_config(PUBLISHED["GLM-4.7-Flash"]).layers[0].mixer
    assert (flash.value_dim, flash.key_dim, flash.rotary.interleaved) == (256, 192, True)


def test_a_class_that_files_call_otherwise() -> None:
    """Phi-3.5-MoE's files have PhiMoEForCausalLM, for which transformers goes by the model_type."""
    config = json.loads((MODELS / "phimoe/config.json").read_text())
    published = read_config({**config, "architectures": ["PhiMoEForCausalLM"]})
    assert published.layers == read_config(config).layers


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2, but latents are expanded for each"),
        ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok is 3, but 1 groups have 2 experts"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, but 8 experts cannot be divided into that many equal groups"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax', but DeepseekV3ForCausalLM"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, but rope needs an even number"),
        ("deepseek_v3", {"architectures": ["DeepseekV32ForCausalLM"]}, "'DeepseekV32ForCausalLM' is not supported"),
        ("deepseek_v3", {"model_type": "deepseek_v32"}, "model_type 'deepseek_v32' does not belong to"),
        ("deepseek_v3", {"index_topk": 2048}, "index_topk = 2048 may change the result"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', but only greedy or"),
        ("deepseek_v3", {"mlp_bias": True}, "mlp_bias = True may change the result"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "must be a list of 4 words, dense or sparse"),
        ("glm4_moe_lite", {"num_local_experts": 4}, "n_routed_experts is 6, but num_local_experts is 4"),
    ],
)  # fmt: skip
def test_latents_refused(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read_config({**fixture(name), **change})
