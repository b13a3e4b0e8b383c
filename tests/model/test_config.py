"""Configurations as transformers writes them, their defaults, and what is refused, by name."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.errors import ModelError
from mpillm.kernels.types import Activation
from mpillm.model.cache_spec import TokenCache
from mpillm.model.config import ModelConfig
from mpillm.model.families import MODEL_TYPES, read_config
from mpillm.model.layers.attention import AttentionSpec, Tuning
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.latent import LatentAttentionSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import NormSpec
from mpillm.model.opening import config_of, open_source
from mpillm.model.rope import RopeConfig, inv_freq
from mpillm.partition.grid import Place
from mpillm.weights.formats import hf

MODELS = Path(__file__).parent.parent / "fixtures/models"
PUBLISHED = json.loads((Path(__file__).parent.parent / "data/published_configs.json").read_text())
# The keys of further published files, with tiny sizes.
KEYS = json.loads((Path(__file__).parent.parent / "data/published_keys.json").read_text())
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def read(kind: str = "llama", **more: Any) -> ModelConfig:
    named = {"model_type": kind, "architectures": [MODEL_TYPES[kind]]}
    return read_config({**SIZES, **named, **more})


def attention(config: ModelConfig) -> AttentionSpec:
    """That of the first layer."""
    return config.layers[0].mixer


def windows(config: ModelConfig) -> tuple[int, ...]:
    return tuple(getattr(layer.mixer, "window", 0) for layer in config.layers)


def rope(config: ModelConfig) -> RopeConfig:
    """That of all layers."""
    (rotary,) = {layer.mixer.rotary for layer in config.layers}
    assert rotary is not None
    if isinstance(config.layers[0].mixer, AttentionSpec):
        assert (rotary.dim, rotary.interleaved) == (attention(config).head_dim, False)
    return rotary.config


def experts(config: ModelConfig) -> tuple[int, ...]:
    """The experts of each layer."""
    return tuple(layer.mlp.count for layer in config.layers)


def fixture(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return config


# What is accepted


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODELS.glob("*/config.json")))
def test_what_transformers_writes_is_read(name: str) -> None:
    raw, _ = hf.read_config(MODELS / name)  # of the text alone, where images are another part
    raw.pop("quantization_config", None)  # is for those who read the files
    config = read_config(raw)
    hidden = raw["n_embd"] if "n_embd" in raw else raw["hidden_size"]
    n_layers = raw["n_layer"] if "n_layer" in raw else raw.get("num_hidden_layers")
    if n_layers is None:
        n_layers = len(raw["layers_block_type"])
    assert config.architecture == raw["architectures"][0]
    assert (config.hidden, config.n_layers, config.vocab) == (hidden, n_layers, raw["vocab_size"])
    assert hash(config) == hash(read_config(raw))


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
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, but 8 experts are no such number of equal groups"),
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


def test_llama() -> None:
    config = read_config(fixture("llama_bias"))
    first, mlp = attention(config), config.layers[0].mlp
    assert isinstance(mlp, MlpSpec)
    assert (first.qkv_bias, first.o_bias, mlp.bias, first.qk_norm) == (True, True, True, None)
    assert (first.n_heads, first.n_kv_heads, first.head_dim) == (2, 2, 12)
    assert (config.bos_id, config.eos_ids) == (1, (2,))
    assert windows(config) == (0, 0)
    assert config.final_norm.eps == 1e-6
    llama3 = rope(read_config(fixture("llama3")))
    assert (llama3.kind, llama3.theta, llama3.original_max_position) == ("llama3", 5e5, 32)


def test_key_value_heads_default_to_heads() -> None:
    config = {"architectures": ["LlamaForCausalLM"], **SIZES}
    del config["num_key_value_heads"]
    assert attention(read_config(config)).n_kv_heads == 4
    assert attention(read("mistral", num_key_value_heads=None)).n_kv_heads == 4


def test_defaults_of_transformers() -> None:
    assert windows(read("mistral")) == (4096,) * 4
    assert windows(read("mistral", sliding_window=None)) == (0,) * 4
    assert windows(read("mixtral", num_local_experts=4)) == (0,) * 4
    assert rope(read("mixtral", num_local_experts=4)).theta == 1e6
    assert read("mixtral", num_local_experts=4).final_norm.eps == 1e-5
    assert attention(read("qwen3")).head_dim == 128
    assert attention(read("qwen3_moe", **MOE)).head_dim == 12
    assert attention(read("qwen2")).head_dim == 12
    assert read("qwen2").max_position == 32768


def test_architecture_from_model_type_alone() -> None:
    assert read_config({"model_type": "qwen2", **SIZES}).architecture == "Qwen2ForCausalLM"


def test_qwen_biases_and_norms() -> None:
    qwen2, qwen3 = attention(read("qwen2")), attention(read("qwen3", attention_bias=True))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, None)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (True, True, NormSpec(1e-6))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_of_some_layers(kind: str) -> None:
    assert windows(read(kind, sliding_window=7, max_window_layers=2)) == (0,) * 4
    assert windows(read(kind, use_sliding_window=True, sliding_window=7, max_window_layers=3)) == (0, 0, 0, 7)
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(read(kind, use_sliding_window=True, sliding_window=7, layer_types=types)) == (7, 0, 7, 0)
    assert windows(read(kind, layer_types=["full_attention"] * 4)) == (0,) * 4


def test_windows_of_all_layers() -> None:
    moe = {**MOE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4}
    assert windows(read("qwen3_moe", **moe)) == (5,) * 4
    assert windows(read("llama", layer_types=["full_attention"] * 4)) == (0,) * 4


def test_windows_of_qwen2_moe() -> None:
    """The first layers have them, every second one; layer_types goes before."""
    moe = {**MOE, "use_sliding_window": True, "sliding_window": 5}
    assert windows(read("qwen2_moe", **moe, max_window_layers=2)) == (5, 0, 0, 0)
    assert windows(read("qwen2_moe", **moe)) == (5, 0, 5, 0)
    dense = read("qwen2_moe", **MOE, mlp_only_layers=[0, 1, 2, 3], shared_expert_intermediate_size=8)
    assert {type(layer.mlp) for layer in dense.layers} == {MlpSpec}
    types = ["full_attention", "sliding_attention"] * 2
    assert windows(read("qwen2_moe", **moe, layer_types=types)) == (0, 5, 0, 5)


@pytest.mark.parametrize("kind", ["phi3", "glm4"])
def test_an_odd_number_of_dimensions_turns(kind: str) -> None:
    """One more does, by the powers that the odd number makes (an array in steps of 2, as transformers has it)."""
    config = read(kind, partial_rotary_factor=0.45, hidden_size=48, head_dim=12, rope_theta=1e4)
    rotary = attention(config).rotary
    assert rotary is not None
    assert rotary.dim == 6
    np.testing.assert_allclose(inv_freq(rotary.config, 6), 1e4 ** (-np.arange(0, 5, 2) / 5), rtol=1e-6)
    with pytest.raises(ModelError, match="which makes 5 dimensions turn, an odd number"):
        read(kind, partial_rotary_factor=0.45, head_dim=12, rope_scaling={"type": "yarn", "factor": 2.0})


def test_experts() -> None:
    mixtral = read("mixtral", num_local_experts=5, num_experts_per_tok=3)
    assert {layer.mlp for layer in mixtral.layers} == {ExpertsSpec(5, 40, RouterSpec(3))}
    qwen = read("qwen3_moe", **MOE, mlp_only_layers=[3], decoder_sparse_step=2)
    assert experts(qwen) == (0, 6, 0, 0)
    assert qwen.layers[1].mlp == ExpertsSpec(6, 20, RouterSpec(2, normalise=False))
    assert qwen.layers[0].mlp == MlpSpec(40)
    assert qwen.expert_share == 2 / 6
    renamed = {**MOE, "num_local_experts": 6}
    del renamed["num_experts"]
    assert experts(read("qwen3_moe", **renamed)) == (6,) * 4
    dense = read("qwen3_moe", **MOE, mlp_only_layers=[0, 1, 2, 3])
    assert {layer.mlp for layer in dense.layers} == {MlpSpec(40)}
    assert dense.expert_share == 1


def test_shards() -> None:
    """The narrowest axis decides: 40 or 20 columns are two blocks or one, 4 heads of 12 make one of 32."""
    mixture = read("qwen3_moe", **MOE, mlp_only_layers=[0])
    assert mixture.max_shards == 4  # heads
    assert mixture.with_block(32).max_shards == 1
    assert read("mixtral").with_block(32).max_shards == 1
    assert read("mixtral", num_attention_heads=2, hidden_size=64).with_block(32).max_shards == 2


def test_special_ids() -> None:
    config = read(bos_token_id=None, eos_token_id=[7, 120, 5, -1])
    assert (config.bos_id, config.eos_ids) == (None, (7, 5))


def test_rope_styles_mean_the_same() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 20}
    expected = rope(read(rope_parameters={"rope_type": "yarn", "rope_theta": 2e4, **yarn}))
    assert rope(read(rope_theta=2e4, rope_scaling={"rope_type": "yarn", **yarn})) == expected
    assert rope(read(rope_theta=2e4, rope_scaling={"type": "yarn", "finetuned": True, **yarn})) == expected
    per_type = {"full_attention": {"rope_type": "yarn", "rope_theta": 2e4, **yarn}}
    assert rope(read("qwen2", layer_types=["full_attention"] * 4, rope_parameters=per_type)) == expected
    assert expected.beta_fast == 20.0
    scaling = {"rope_type": "yarn", "llama_4_scaling_beta": 0.5, **yarn}
    own = read("ministral3", rope_theta=2e4, rope_scaling=scaling, head_dim=12)
    assert rope(own) == expected  # not what the class has where nothing is said
    assert attention(own).tuning == Tuning(0.5, 64, offset=0)


def test_rope_defaults() -> None:
    assert rope(read()).theta == 1e4
    assert rope(read(rope_theta=3e5, rope_scaling=None)).theta == 3e5
    assert rope(read(rope_scaling={"rope_type": "default"})).kind == "default"
    no_factor = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    assert rope(read(rope_scaling=no_factor, max_position_embeddings=4096)).factor == 4.0
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert rope(read(rope_scaling=llama3, max_position_embeddings=300)).original_max_position == 300
    # Like transformers: the configuration's own number goes before the dict's.
    both = {**llama3, "original_max_position_embeddings": 50}
    assert rope(read(rope_scaling=both, original_max_position_embeddings=60)).original_max_position == 60


def test_rope_factors_of_gguf() -> None:
    found = rope(read(rope_parameters={"rope_type": "factors", "factors": [1, 2, 3.5, 4, 5, 6]}))
    assert found.kind == "factors"
    assert found.factors == (1.0, 2.0, 3.5, 4.0, 5.0, 6.0)


@pytest.mark.parametrize(
    "extra",
    [
        {
            "unsloth_version": "2024.9",
            "unsloth_fixed": True,
            "_name_or_path": "x",
            "auto_map": {"AutoModel": "y"},
        },
        {"torch_dtype": "bfloat16", "transformers_version": "4.1", "use_cache": False, "pretraining_tp": 4},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        {
            "attention_dropout": 0.1,
            "initializer_range": 0.041,
            "pad_token_id": 2,
            "quantization_config": None,
        },
        {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 20, "pruned_heads": {}},
        {"some_feature_of_the_future": None, "sliding_window": None, "clip_qkv": None, "logit_scale": 1.0},
        {"hidden_act": "swish", "n_shared_experts": 0, "partial_rotary_factor": 1.0},
    ],
)
def test_harmless_keys(extra: dict[str, Any]) -> None:
    assert read(**extra) == read()


def test_keys_that_nobody_knows_are_ignored_and_named() -> None:
    config = read(no_such_key=[1], another="x", temperature=0.5)
    assert config == read()
    assert config.ignored_keys == ("another", "no_such_key")
    assert read().ignored_keys == ()


@pytest.mark.parametrize(
    ("kind", "published"),
    [("internlm3", "InternLM3ForCausalLM"), ("iquestcoder", "IQuestCoderForCausalLM")],
)
def test_what_transformers_saves_as_llama(kind: str, published: str) -> None:
    assert read(kind).architecture == "LlamaForCausalLM"
    assert read(kind, architectures=None) == read()
    assert replace(read(kind, architectures=[published]), architecture="LlamaForCausalLM") == read()


def test_biases_of_internlm3_have_names_of_their_own() -> None:
    biased = read("internlm3", qkv_bias=True, bias=True)
    assert biased == read(attention_bias=True, mlp_bias=True)
    with pytest.raises(ModelError, match="qkv_bias is True, but must be as bias is"):
        read("internlm3", qkv_bias=True)
    with pytest.raises(ModelError, match="qkv_bias"):
        read(qkv_bias=True)


def test_layers_that_predict_further_tokens_change_nothing() -> None:
    assert read(num_nextn_predict_layers=2) == read()


def test_layer_types_that_say_what_is_so() -> None:
    full, sliding = ["full_attention"] * 4, ["sliding_attention"] * 4
    starcoder = {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", **SIZES}
    assert read_config({**starcoder, "layer_types": full}) == read_config(starcoder)
    windowed = {**starcoder, "sliding_window": 9}
    assert read_config({**windowed, "layer_types": sliding}) == read_config(windowed)
    for config, types in ((starcoder, sliding), (windowed, full)):
        with pytest.raises(ModelError, match="for layer 0, but Starcoder2ForCausalLM has"):
            read_config({**config, "layer_types": types})


def test_dual_chunk_attention_up_to_its_border() -> None:
    dual = {"chunk_size": 200, "local_size": 20, "original_max_position_embeddings": 256}
    assert read("qwen2", dual_chunk_attention_config=dual).max_position == 256


def test_what_transformers_ignores_in_rope() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert rope(read(rope_scaling={**yarn, "attn_factor": 0.8782488562869419})) == rope(
        read(rope_scaling=yarn)
    )
    for kind in ("default", "mrope"):
        assert rope(read(rope_scaling={"type": kind, "mrope_section": [2, 2, 2]})) == rope(read())


# What is refused, and the words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "architecture 'OPTForCausalLM' is not supported; mpillm models lists"),
        ({"architectures": ["Qwen5ForCausalLM"]}, "not supported; similar ones that are: Qwen3_5ForCausalLM, Qwen3For"),
        ({"architectures": None, "model_type": "mamba"}, "architectures is missing"),
        ({"architectures": []}, "architectures must be a list of one name"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of one name"),
        ({"model_type": "mistral"}, "model_type 'mistral' does not belong to LlamaForCausalLM"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', but only silu or swish or gelu or .* is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only models that rotate the whole head"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'quant_method': 'gptq'} may"),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0 may change the result and is not supported in LlamaForCausalLM"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"logit_scale": 0.0625}, "logit_scale = 0.0625"),
        ({"embedding_multiplier": 12}, "embedding_multiplier = 12"),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
        ({"n_shared_experts": 2}, "n_shared_experts = 2"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size = 8192"),
        ({"sliding_window": 512}, "sliding_window = 512"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"use_qk_norm": True}, "use_qk_norm is True, but LlamaForCausalLM is built without that"),
        (
            dict.fromkeys(("alibi", "post_norm", "qk_norm", "scale_emb", "use_alibi", "window_size"), 1),
            "alibi = 1, post_norm = 1, qk_norm = 1, scale_emb = 1 and 2 more may change",
        ),
        ({"rope_scaling": {"type": "dynamic", "alpha": 2.0}}, "alpha is not supported with rope type dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor must be 6 positive numbers"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "rope type 'ntk' is not supported"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope type \"\\['yarn'\\]\" is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, "factor is 2.0, but the rope type is default"),
        ({"rope_scaling": {"beta_fast": 2.0}}, "the rope type is missing"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, but must be a number from 1e-06"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 1}}, "beta_fast is not supported with"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor is 4, but must be greater than low_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 3}}, "not be less than beta_slow"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1}, "rope_theta must be greater than 1"),
        ({"rope_scaling": {"type": "factors", "factors": [1.0]}}, "factors must be 6 positive numbers"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 5.0}}, "both given"),
        ({"rope_parameters": {"full_attention": {"factor": 2}, "x": 1}, "layer_types": ["x"] * 4}, "layer type 'x'"),
        ({"rope_parameters": "linear"}, "rope_parameters is 'linear', but must be a table"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', but must be a number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"hidden_size": "48"}, "hidden_size is '48', but must be a whole number from 1"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"intermediate_size": 10**40}, "intermediate_size is 1000"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings is"),
        ({"num_key_value_heads": 3}, r"num_attention_heads is 4, but must be a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 7}, "a head has 7 dimensions, but rope needs an even number"),
        ({"hidden_size": 3}, "a head has 0 dimensions"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, but must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', but must be whole numbers"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer type 'chunked_attention'"),
        ({"layer_types": [{}] * 4}, "layer type '{}' in layer_types"),
        ({"layer_types": ["full_attention"]}, "must be a list of 4 names"),
        ({"layer_types": ["sliding_attention"] * 4}, "no sliding_window is in use"),
    ],
)  # fmt: skip
def test_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read(**change)
    message = str(caught.value)
    assert message.startswith("config.json")
    assert message.endswith(".")
    assert len(message) < 400


def test_a_dynamic_rope_changes_nothing_up_to_the_longest_sequence() -> None:
    for kind in ("llama", "hunyuan_v1_dense"):
        dynamic, usual = (
            read(kind, rope_scaling=rope) for rope in ({"type": "dynamic", "factor": 3.0}, None)
        )
        assert dynamic == usual


@pytest.mark.parametrize(
    ("names", "same"),
    [
        (["silu", "swish"], Activation.SILU),
        (["gelu", "gelu_python"], Activation.GELU),
        (["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"], Activation.GELU_TANH),
        (["relu2"], Activation.RELU2),
    ],
)
def test_activations_by_their_names(names: list[str], same: Activation) -> None:
    for name in names:
        for kind, more in (("llama", {}), ("qwen3_moe", MOE)):
            layer = read(kind, hidden_act=name, **more).layers[-1]
            assert layer.mlp is not None
            assert layer.mlp.activation == same


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias = True may change"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"sliding_window": 9, "layer_types": ["full_attention"] * 4}, "has windows in all layers"),
        ("qwen2", {"attention_bias": False}, "Qwen2ForCausalLM always has biases"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": "9"}, "sliding_window is '9'"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen3", {"use_qk_norm": False}, "use_qk_norm is False, but Qwen3ForCausalLM is built with that"),
        ("mixtral", {"num_local_experts": 1}, "num_experts_per_tok is None, but the model has 1 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0, but must be at least 1"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob is False, but Mixtral always divides"),
        ("qwen3_moe", {**MOE, "num_experts_per_tok": 7}, "num_experts_per_tok is 7, but the model has 6 experts"),
        ("qwen3_moe", {**MOE, "num_local_experts": 4}, "num_experts is 6, but num_local_experts is 4"),
        ("qwen3_moe", {**MOE, "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {**MOE, "mlp_only_layers": ["1"]}, "mlp_only_layers is"),
        ("qwen3_moe", {**MOE, "shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8"),
    ],
)  # fmt: skip
def test_refused_in_one_architecture(kind: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        read(kind, **change)


def test_not_a_dict() -> None:
    with pytest.raises(ModelError, match=r"weights\.gguf: expected an object"):
        read_config([1], name="weights.gguf")  # type: ignore[arg-type]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@given(name=st.sampled_from(["llama_yarn", "qwen2_window", "qwen3_moe", "mixtral"]), data=st.data())
def test_no_value_ends_in_a_traceback(name: str, data: st.DataObject) -> None:
    config = fixture(name)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3, unique=True)):
        if isinstance(config[key], dict) and data.draw(st.booleans()):
            inner = dict(config[key])
            inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(VALUES)
            config[key] = inner
        else:
            config[key] = data.draw(VALUES)
    with contextlib.suppress(ModelError):
        read_config(config)


def test_a_granite_file_without_a_scale_of_attention(tmp_path: Path) -> None:
    """Then scores are multiplied by 1 / sqrt(head_dim), as llama.cpp does; transformers' default is 1."""
    file = Path(__file__).parents[1] / "fixtures" / "gguf" / "granite_f16.gguf"
    data = file.read_bytes()
    assert data.count(b"granite.attention.scale") == 1
    path = tmp_path / "granite.gguf"
    path.write_bytes(data.replace(b"granite.attention.scale", b"general.notes_on_scales"))
    scales = []
    for each in (file, path):
        with contextlib.closing(open_source(each)) as source:
            mixer = config_of(source).layers[0].mixer
        assert isinstance(mixer, AttentionSpec)
        scales.append(mixer.scale)
    assert scales == [pytest.approx(0.2), mixer.head_dim**-0.5]


@pytest.mark.parametrize(
    ("name", "has"), [("qwen3", True), ("qwen3_window", True), ("qwen2", False), ("qwen3_moe", False)]
)
def test_the_template_of_rerankers_is_qwen3s(name: str, has: bool) -> None:
    with contextlib.closing(open_source(MODELS / name)) as source:
        template = config_of(source).pair_template
    assert (template is not None) is has
    if template is not None:
        filled = template.format(instruction="I", query="Q", document="D")
        assert "<Instruct>: I\n<Query>: Q\n<Document>: D<|im_end|>\n" in filled
        assert filled.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
