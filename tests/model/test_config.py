"""Configurations as transformers writes them, their defaults, and what is refused, by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.errors import ModelError
from mpillm.model.config import MODEL_TYPES, ModelConfig

MODELS = Path(__file__).parent.parent / "fixtures/models"
PUBLISHED = json.loads((Path(__file__).parent.parent / "data/published_configs.json").read_text())
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
    return ModelConfig.from_dict({**SIZES, **named, **more})


def fixture(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return config


# What is accepted


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODELS.glob("*/config.json")))
def test_what_transformers_writes_is_read(name: str) -> None:
    raw = fixture(name)
    config = ModelConfig.from_dict(raw)
    assert config.architecture == raw["architectures"][0]
    assert (config.hidden, config.n_layers, config.vocab) == (
        raw["hidden_size"],
        raw["num_hidden_layers"],
        raw["vocab_size"],
    )
    assert len(config.windows) == len(config.moe_layers) == config.n_layers
    assert hash(config) == hash(ModelConfig.from_dict(raw))


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_read(name: str) -> None:
    config = ModelConfig.from_dict(PUBLISHED[name])
    assert config.hidden == PUBLISHED[name]["hidden_size"]
    assert config.windows[0] == (4096 if name == "Mistral-7B-v0.1" else 0)
    assert config.rope.kind == {
        "Llama-3.2-1B-Instruct": "llama3",
        "Qwen2.5-7B with its card's YaRN": "yarn",
    }.get(name, "default")


def test_llama() -> None:
    config = ModelConfig.from_dict(fixture("llama_bias"))
    assert (config.attention_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (
        True,
        True,
        True,
        False,
    )
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (2, 2, 12)
    assert (config.bos_id, config.eos_ids) == (1, (2,))
    assert config.windows == (0, 0)
    assert config.rms_eps == 1e-6
    tied = ModelConfig.from_dict(fixture("llama3"))
    assert tied.tied
    assert (tied.rope.kind, tied.rope.theta, tied.rope.original_max_position) == ("llama3", 5e5, 32)


def test_key_value_heads_default_to_heads() -> None:
    config = {"architectures": ["LlamaForCausalLM"], **SIZES}
    del config["num_key_value_heads"]
    assert ModelConfig.from_dict(config).n_kv_heads == 4
    assert read("mistral", num_key_value_heads=None).n_kv_heads == 4


def test_defaults_of_transformers() -> None:
    assert read("mistral").windows == (4096,) * 4
    assert read("mistral", sliding_window=None).windows == (0,) * 4
    assert read("mixtral", num_local_experts=4).windows == (0,) * 4
    assert read("mixtral", num_local_experts=4).rope.theta == 1e6
    assert read("mixtral", num_local_experts=4).rms_eps == 1e-5
    assert read("qwen3").head_dim == 128
    assert read("qwen3_moe", **MOE).head_dim == 12
    assert read("qwen2").head_dim == 12
    assert read("qwen2").max_position == 32768
    assert not any(read(kind).tied for kind in ("llama", "mistral", "qwen2", "qwen3"))


def test_architecture_from_model_type_alone() -> None:
    assert ModelConfig.from_dict({"model_type": "qwen2", **SIZES}).architecture == "Qwen2ForCausalLM"


def test_qwen_biases_and_norms() -> None:
    qwen2, qwen3 = read("qwen2"), read("qwen3", attention_bias=True)
    assert (qwen2.attention_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.attention_bias, qwen3.o_bias, qwen3.qk_norm) == (True, True, True)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_of_some_layers(kind: str) -> None:
    assert read(kind, sliding_window=7, max_window_layers=2).windows == (0,) * 4
    assert read(kind, use_sliding_window=True, sliding_window=7, max_window_layers=3).windows == (0, 0, 0, 7)
    types = ["sliding_attention", "full_attention"] * 2
    assert read(kind, use_sliding_window=True, sliding_window=7, layer_types=types).windows == (7, 0, 7, 0)
    assert read(kind, layer_types=["full_attention"] * 4).windows == (0,) * 4


def test_windows_of_all_layers() -> None:
    moe = {**MOE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4}
    assert read("qwen3_moe", **moe).windows == (5,) * 4
    assert read("llama", layer_types=["full_attention"] * 4).windows == (0,) * 4


def test_experts() -> None:
    mixtral = read("mixtral", num_local_experts=5, num_experts_per_tok=3)
    assert (mixtral.n_experts, mixtral.experts_per_token, mixtral.moe_intermediate) == (5, 3, 40)
    assert mixtral.norm_topk
    assert mixtral.moe_layers == (True,) * 4
    qwen = read("qwen3_moe", **MOE, mlp_only_layers=[3], decoder_sparse_step=2)
    assert qwen.moe_layers == (False, True, False, False)
    assert (qwen.n_experts, qwen.moe_intermediate, qwen.norm_topk) == (6, 20, False)
    renamed = {**MOE, "num_local_experts": 6}
    del renamed["num_experts"]
    assert read("qwen3_moe", **renamed).n_experts == 6
    dense = read("qwen3_moe", **MOE, mlp_only_layers=[0, 1, 2, 3])
    assert (dense.n_experts, dense.moe_intermediate) == (0, 0)


def test_shape() -> None:
    shape = read("qwen3_moe", **MOE, mlp_only_layers=[0]).shape(unit=32)
    assert dataclasses.asdict(shape) == {
        "n_layers": 4, "hidden": 48, "n_heads": 4, "n_kv_heads": 2, "head_dim": 12, "intermediate": 40, "vocab": 99,
        "n_experts": 6, "moe_intermediate": 20, "unit": 32,
    }  # fmt: skip
    assert read("qwen3_moe", **MOE).shape(unit=1).intermediate == 0  # no dense layer to cut
    assert read("mixtral").shape(unit=1).ffn_widths == (40,)


def test_special_ids() -> None:
    config = read(bos_token_id=None, eos_token_id=[7, 120, 5, -1])
    assert (config.bos_id, config.eos_ids) == (None, (7, 5))


def test_rope_styles_mean_the_same() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 20}
    expected = read(rope_parameters={"rope_type": "yarn", "rope_theta": 2e4, **yarn}).rope
    assert read(rope_theta=2e4, rope_scaling={"rope_type": "yarn", **yarn}).rope == expected
    assert read(rope_theta=2e4, rope_scaling={"type": "yarn", "finetuned": True, **yarn}).rope == expected
    per_type = {"full_attention": {"rope_type": "yarn", "rope_theta": 2e4, **yarn}}
    assert read("qwen2", layer_types=["full_attention"] * 4, rope_parameters=per_type).rope == expected
    assert expected.beta_fast == 20.0


def test_rope_defaults() -> None:
    assert read().rope.theta == 1e4
    assert read(rope_theta=3e5, rope_scaling=None).rope.theta == 3e5
    assert read(rope_scaling={"rope_type": "default"}).rope.kind == "default"
    no_factor = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    assert read(rope_scaling=no_factor, max_position_embeddings=4096).rope.factor == 4.0
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert read(rope_scaling=llama3, max_position_embeddings=300).rope.original_max_position == 300
    # Like transformers: the configuration's own number goes before the dict's.
    both = {**llama3, "original_max_position_embeddings": 50}
    assert read(rope_scaling=both, original_max_position_embeddings=60).rope.original_max_position == 60


def test_rope_factors_of_gguf() -> None:
    rope = read(rope_parameters={"rope_type": "factors", "factors": [1, 2, 3.5, 4, 5, 6]}).rope
    assert rope.kind == "factors"
    assert rope.factors == (1.0, 2.0, 3.5, 4.0, 5.0, 6.0)


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


# What is refused, and the words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported; supported are"),
        ({"architectures": None, "model_type": "mamba"}, "architectures is missing"),
        ({"architectures": []}, "architectures must be a list of one name"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of one name"),
        ({"model_type": "mistral"}, "model_type 'mistral' does not belong to LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only silu or swish is supported"),
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
        ({"no_such_key": [1]}, r"no_such_key = \[1\]"),
        ({"sliding_window": 512}, "sliding_window = 512"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"use_qk_norm": True}, "use_qk_norm is True, but LlamaForCausalLM is built without that"),
        ({f"key{i}": 1 for i in range(6)}, "key0 = 1, key1 = 1, key2 = 1, key3 = 1 and 2 more may change"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
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
        ModelConfig.from_dict([1], name="weights.gguf")  # type: ignore[arg-type]


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
        ModelConfig.from_dict(config)
