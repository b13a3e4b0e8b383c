"""The configuration that a GGUF file gives, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mpillm.errors import ModelError
from mpillm.model.opening import open_source
from mpillm.weights.identity import fingerprint
from tests.weights.build import Tiny, write_gguf


def config_of(tmp_path, model=None, arch="llama", **kwargs):
    return open_source(write_gguf(tmp_path / "m.gguf", model or Tiny(), arch, **kwargs)).config


def test_config_of_llama(tmp_path):
    extra = {
        "tokenizer.ggml.tokens": ["a", "b", "\u00e9"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 5,
        "general.name": "tiny",
        "vocab_size": 100,
    }
    path = write_gguf(tmp_path / "m.gguf", Tiny(), extra=extra)
    source = open_source(path)
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "rms_norm_eps": pytest.approx(1e-5, rel=1e-7),
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    assert source.tokenizer["tokenizer.ggml.tokens"] == ["a", "b", "\u00e9"]
    assert all(name.startswith("tokenizer.") for name in source.tokenizer)
    assert fingerprint(source)[0] == path.stat().st_size


def test_config_of_the_others(tmp_path):
    biased = config_of(tmp_path, Tiny(attention_bias=True, o_bias=True))
    assert biased["architectures"] == ["LlamaForCausalLM"]
    assert biased["attention_bias"] is True
    assert config_of(tmp_path, Tiny(attention_bias=True))["architectures"] == ["Qwen2ForCausalLM"]
    assert config_of(tmp_path, Tiny(mlp_bias=True))["mlp_bias"] is True
    mistral = config_of(tmp_path, extra={"attention.sliding_window": 64})
    assert (mistral["architectures"], mistral["sliding_window"]) == (["MistralForCausalLM"], 64)
    experts = Tiny(n_experts=3, moe_intermediate=96)
    mixtral = config_of(tmp_path, experts)
    assert mixtral["architectures"] == ["MixtralForCausalLM"]
    assert (mixtral["num_local_experts"], mixtral["num_experts_per_tok"], mixtral["sliding_window"]) == (
        3,
        2,
        None,
    )
    assert config_of(tmp_path, Tiny(attention_bias=True), "qwen2")["model_type"] == "qwen2"
    assert config_of(tmp_path, Tiny(qk_norm=True), "qwen3")["model_type"] == "qwen3"
    of_images = {"rope.dimension_sections": [4, 4, 0, 0], "n_deepstack_layers": 3}
    for kind, tiny in {
        "qwen2": Tiny(attention_bias=True),
        "qwen3": Tiny(qk_norm=True),
        "qwen3moe": Tiny(n_experts=3, moe_intermediate=32, qk_norm=True),
    }.items():
        named = kind.replace("moe", "vlmoe") if "moe" in kind else f"{kind}vl"
        text = config_of(tmp_path, tiny, named, extra=of_images)
        assert text == config_of(tmp_path, tiny, kind)
    dense = Tiny(n_experts=3, moe_intermediate=32, qk_norm=True, dense_layers=(0,), n_layers=3)
    moe = config_of(tmp_path, dense, "qwen3moe")
    assert moe["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (moe["num_experts"], moe["moe_intermediate_size"], moe["mlp_only_layers"]) == (3, 32, [0])
    assert moe["norm_topk_prob"] is True
    same = config_of(tmp_path, extra={"attention.head_count_kv": [2, 2], "feed_forward_length": [96, 96]})
    assert (same["num_key_value_heads"], same["intermediate_size"]) == (2, 96)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.attn_factor": 2.0,
            },
            {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 512,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": pytest.approx(2 * (0.1 * np.log(8.0) + 1)),
            },
        ),
    ],
)
def test_rope_scaling(tmp_path, extra, expected):
    assert config_of(tmp_path, extra=extra)["rope_parameters"] == {"rope_theta": 10000.0} | expected


def test_rope_factors(tmp_path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    rope = config_of(tmp_path, more={"rope_freqs.weight": factors})["rope_parameters"]
    assert rope == {"rope_theta": 10000.0, "rope_type": "factors", "factors": factors.tolist()}
    with pytest.raises(ModelError, match=r"rope_freqs\.weight together with yarn scaling is not supported"):
        config_of(
            tmp_path,
            more={"rope_freqs.weight": factors},
            extra={"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
        )


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"extra": {"attention.temperature_length": 3}}, "llama.attention.temperature_length = 3 may change"),
        ({"extra": {"attention.causal": False}}, "llama.attention.causal = False may change the result"),
        ({"extra": {"logit_scale": 0.5}}, "llama.logit_scale = 0.5 may change the result"),
        ({"extra": {"rope.scaling.type": "longrope"}}, "rope.scaling.type 'longrope' is not supported"),
        (
            {"extra": {"rope.dimension_count": 8}},
            "rope.dimension_count is 8, but only models that rotate the whole",
        ),
        ({"extra": {"attention.value_length": 8}}, "keys and values of different lengths are not supported"),
        (
            {"extra": {"attention.head_count_kv": [2, 1]}},
            "attention.head_count_kv is [2, 1], but must be one whole",
        ),
        ({"extra": {"attention.head_count": 0}}, "head_count is 0, but must be at least 1"),
        ({"extra": {"attention.head_count": 5}}, "tensor blk.0.attn_q.weight has 64 rows, not 5 even heads"),
        ({"extra": {"block_count": None}}, "metadata field llama.block_count is missing"),
        ({"extra": {"context_length": "long"}}, "llama.context_length is long, but must be one whole number"),
        (
            {"extra": {"rope.freq_base": float("nan")}},
            "llama.rope.freq_base is nan, but must be one finite number",
        ),
        ({"extra": {"rope.scaling.attn_factor": 2.0}}, "attn_factor without yarn is not supported"),
        (
            {"arch": "bloom"},
            "has architecture 'bloom', which is not supported; mpillm models --architectures lists",
        ),
        (
            {"arch": "qwen2", "extra": {"attention.sliding_window": 8}},
            "sliding_window is not supported in qwen2",
        ),
        ({"arch": "qwen2", "extra": {"expert_count": 8}}, "experts are not supported in qwen2 files"),
        ({"drop": ("token_embd.weight",)}, "has no tensor token_embd.weight"),
        (
            {"more": {"blk.0.attn_nothing.weight": np.ones(4, np.float32)}},
            "'blk.0.attn_nothing.weight' belongs to no",
        ),
        (
            {"more": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
            "has q_bias without the other biases of its kind",
        ),
        (
            {"more": {"output_norm.weight": np.ones((1, 64), np.float32)}},
            "shape [1, 64], but must have 1 dimensions",
        ),
        (
            {"more": {"rope_freqs.weight": np.ones((2, 8), np.float32)}},
            "rope_freqs.weight must be a vector of F32",
        ),
        (
            {"more": {"blk.0.ffn_up_exps.weight": np.ones((2, 8), np.float32)}},
            "shape [2, 8], but must have 3 dim",
        ),
        ({"extra": {"split.count": 2}}, "llama.split.count = 2 may change the result"),
    ],
)
def test_refuses_what_it_does_not_know(tmp_path, kwargs, words):
    with pytest.raises(ModelError) as error:
        config_of(tmp_path, **kwargs)
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("unset", [-1, 2**32 - 1])
def test_ids_that_are_not_set(tmp_path, unset):
    ids = {f"tokenizer.ggml.{name}_token_id": unset for name in ("bos", "eos", "eot")}
    config = config_of(tmp_path, extra=ids | {"tokenizer.ggml.eom_token_id": 3})
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, [3])
