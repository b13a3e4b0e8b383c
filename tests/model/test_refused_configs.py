"""Configurations that are refused, each with the name of the key that is wrong."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.errors import ModelError
from mpillm.model.families import read_config
from tests.model.configs import MOE, fixture, read

# What is refused, and the words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"architectures": ["BloomForCausalLM"]},
            "architecture 'BloomForCausalLM' is not supported; mpillm models --architectures",
        ),
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
