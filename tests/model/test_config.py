"""Configurations as transformers writes them, and their defaults."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.errors import ModelError
from mpillm.kernels.types import Activation
from mpillm.model.families import read_config
from mpillm.model.layers.attention import AttentionSpec, Tuning
from mpillm.model.layers.experts import ExpertsSpec, RouterSpec
from mpillm.model.layers.mlp import MlpSpec
from mpillm.model.layers.norm import NormSpec
from mpillm.model.opening import config_of, open_source
from mpillm.model.rope import inv_freq
from mpillm.weights.formats import hf
from tests.model.configs import MODELS, MOE, SIZES, attention, experts, fixture, read, rope, windows

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
    with pytest.raises(ModelError, match="which makes 5 dimensions rotate, an odd number"):
        read(kind, partial_rotary_factor=0.45, head_dim=12, rope_scaling={"type": "yarn", "factor": 2.0})


@pytest.mark.parametrize("table", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["glm4", "gpt_neox", "phi", "stablelm", "minimax_m2", "nemotron", "bamba"])
def test_the_part_of_a_head_that_rotates(kind: str, table: str) -> None:
    """A table of RoPE, of either name, goes before the key beside it."""
    own = {"mamba_n_heads": 4, "mamba_d_head": 32, "attn_layer_indices": [0]} if kind == "bamba" else {}
    for part, beside in ((0.25, {}), (0.5, {"partial_rotary_factor": 0.75}), (1.0, {})):
        rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0, "partial_rotary_factor": part}
        rotary = attention(read(kind, head_dim=16, hidden_size=64, **{table: rope}, **beside, **own)).rotary
        assert rotary is not None
        assert rotary.dim == 16 * part
    rope["partial_rotary_factor"] = "0.5"
    with pytest.raises(
        ModelError, match=r"partial_rotary_factor is '0\.5', but must be a number from 0 to 1"
    ):
        read(kind, head_dim=16, hidden_size=64, **{table: rope}, **own)


def test_a_part_of_a_head_that_is_too_small_or_odd() -> None:
    """The number that is named is the one that was read, also where it is the class's own."""
    words = r"partial_rotary_factor is 0\.25, which makes 3 dimensions rotate, an odd number"
    with pytest.raises(ModelError, match=words):
        read("stablelm", hidden_size=48, rope_scaling={"type": "yarn", "factor": 2.0})
    with pytest.raises(
        ModelError, match=r"partial_rotary_factor is 0\.05, which makes 0 of 12 dimensions rotate"
    ):
        read("phi", hidden_size=48, partial_rotary_factor=0.05)
    # transformers cuts their heads where the odd number says, and fails
    for kind in ("gpt_neox", "phi", "stablelm"):
        for part, dim in ((0.25, 3), (0.1, 1)):
            rope = {"rope_type": "default", "partial_rotary_factor": part}
            with pytest.raises(ModelError, match=f"which makes {dim} dimensions rotate, an odd number"):
                read(kind, hidden_size=48, rope_parameters=rope)


def test_two_names_of_the_base_of_rope() -> None:
    for base in (123.0, 5e5):
        assert rope(read("gpt_neox", rotary_emb_base=base, rotary_pct=1.0)).theta == base
        assert rope(read("gpt_neox", rotary_emb_base=base, rope_theta=base, rotary_pct=1.0)).theta == base
    with pytest.raises(ModelError, match=r"rope_theta is 10000, but rotary_emb_base is 500000; keep one"):
        read("gpt_neox", rotary_emb_base=5e5, rope_theta=10000)


def test_a_gate_has_a_bias_if_its_class_has_it() -> None:
    """attention_bias is of Qwen's gates too, which lie in q_proj, and not of those of AFMoE."""
    for kind, more, gate in (("qwen3_5_text", {}, {"q_gate_bias"}), ("afmoe", MOE, set())):
        config = read(kind, **more, attention_bias=True, layer_types=["full_attention"] * 4)
        roles = {spec.key.role for spec in attention(config).tensors(0, 48, 1)}
        assert {role for role in roles if role.endswith("_bias")} == {
            "q_bias",
            "k_bias",
            "v_bias",
            "o_bias",
        } | gate


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
        (["relu"], Activation.RELU),
    ],
)
def test_activations_by_their_names(names: list[str], same: Activation) -> None:
    for name in names:
        for kind, more in (("llama", {}), ("qwen3_moe", MOE)):
            layer = read(kind, hidden_act=name, **more).layers[-1]
            assert layer.mlp is not None
            assert layer.mlp.activation == same


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
