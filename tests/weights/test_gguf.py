from __future__ import annotations

import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm import kernels
from mpillm.errors import JobError, ModelError
from mpillm.kernels.types import BlockType
from mpillm.model.opening import open_source
from mpillm.weights.formats.gguf_header import read_header
from mpillm.weights.formats.stored import stored_in_gguf
from mpillm.weights.identity import fingerprint
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.opening import file_in
from mpillm.weights.roles import Key, hf_name
from mpillm.weights.source import column_unit
from tests.weights.build import Tiny, through, write_gguf

OWN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "MXFP4", "Q5_0", "Q5_1")
U32, STRING, ARRAY = 4, 8, 9


def blocks_of(values: np.ndarray, kind: str) -> np.ndarray:
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return quantised.view(np.uint8).reshape(len(values), -1)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", OWN)
def test_own_types_are_delivered_as_they_are(tmp_path, arch, kind):
    """Also q and k of the llama architecture, whose rows lie in another order in the file."""
    model = Tiny(
        head_dim=24, attention_bias=arch != "qwen3", o_bias=arch == "llama", qk_norm=arch == "qwen3", seed=7
    )
    source = open_source(write_gguf(tmp_path / "m.gguf", model, arch, (kind,)))
    assert len(source.tensors) == len(model.weights())
    block = BlockType[kind]
    for key, info in source.tensors.items():
        expected = model.weights()[hf_name(key)]
        assert info.shape == expected.shape
        if expected.ndim == 1:
            assert (source.read_f32(key) == expected).all()
            assert (source.read_f32(key, range(2, 11)) == expected[2:11]).all()
            continue
        assert (info.stored, info.type) == (kind, block)
        blocks = blocks_of(expected, kind)
        assert (source.read(key) == blocks).all()
        assert (source.read(key, range(3, 30)) == blocks[3:30]).all()
        first, stop = (32 // block.block * block.block_bytes, 64 // block.block * block.block_bytes)
        assert (source.read(key, range(1, 18), range(32, 64)) == blocks[1:18, first:stop]).all()
        ids = np.array([5, 1, 5, 0])
        assert (source.read_f32(key, ids) == through(kind, expected)[ids]).all()
    assert column_unit(source) == block.block


def decodable() -> list[str]:
    kinds = (stored_in_gguf(int(kind)) for kind in gguf.GGMLQuantizationType)
    return sorted(kind.name for kind in kinds if kind and not kind.own)


def test_kinds_that_can_be_decoded():
    assert {"IQ1_S", "TQ2_0", "NVFP4"} <= set(decodable())
    assert stored_in_gguf(int(gguf.GGMLQuantizationType.I32)) is None
    assert stored_in_gguf(int(gguf.GGMLQuantizationType.Q8_K)) is None
    assert stored_in_gguf(4) is None
    assert stored_in_gguf(999) is None


@pytest.mark.parametrize("kind", [kind for kind in decodable() if kind != "NVFP4"])
def test_other_types_become_q8_0(tmp_path, kind):
    """Random blocks (zeroed where a float16 scale would be no number), against the library's decoder."""
    stored = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[stored]
    random = np.random.default_rng(len(kind))
    model = Tiny(hidden=512, vocab=40, n_layers=1)
    raw = random.integers(0, 256, (40, 512 // gguf.GGML_QUANT_SIZES[stored][0] * size), np.uint8)
    values = gguf.quants.dequantize(raw & np.uint8(0x3B), stored)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 8, "embedding_length": 512, "feed_forward_length": 8}
    for name, value in (sizes | {"attention.head_count": 4}).items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", raw & np.uint8(0x3B), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(path)
    info = source.tensors[Key("head")]
    assert (info.stored, info.type, info.shape) == (kind, BlockType.Q8_0, (model.vocab, 512))
    assert np.isfinite(values).all()
    assert (source.read_f32(Key("embed"), np.array([3, 3, 39])) == values[[3, 3, 39]]).all()
    expected = np.empty((40, 512 // 32 * 34), np.uint8)
    kernels.quantize(BlockType.Q8_0, values, expected, 1)
    assert (source.read(Key("head")) == expected).all()
    assert (source.read(Key("head"), range(4, 21), range(96, 288)) == expected[4:21, 3 * 34 : 9 * 34]).all()


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_nvfp4(tmp_path, arch):
    """With the numbers that matrices, or each expert's, are times; what activations are times is not read."""
    experts = 3 if arch == "qwen3moe" else 0
    size = {
        "hidden": 128,
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 32,
        "n_layers": 1,
        "moe_intermediate": 64,
    }
    model = Tiny(**size, intermediate=192, n_experts=experts, qk_norm=bool(experts))
    whole = {f"blk.0.attn_{name}.scale": np.array([0.25 + i], np.float32) for i, name in enumerate("qkv")}
    more = whole | {"blk.0.attn_q.input_scale": np.ones(1, np.float32)}
    if experts:
        more["blk.0.ffn_down_exps.scale"] = np.array([0.5, 2, 3], np.float32)
    source = open_source(write_gguf(tmp_path / "m.gguf", model, arch, ("NVFP4",), more=more))
    assert len(source.tensors) == len(model.weights())
    values = {name: through("NVFP4", value) for name, value in model.weights().items() if value.ndim == 2}
    for key, info in source.tensors.items():
        expected = model.weights()[hf_name(key)]
        if expected.ndim == 1 or key.role == "router":
            continue
        factor = whole.get(f"blk.0.attn_{key.role}.scale", np.ones(1))[0]
        if key.role == "down" and experts:
            factor = more["blk.0.ffn_down_exps.scale"][key.expert]
        expected = values[hf_name(key)] * np.float32(factor)
        assert info.stored == "NVFP4"
        if info.type is BlockType.NVFP4:  # not F32, as narrow ones of o and down are
            assert source.read(key).nbytes == len(expected) * BlockType.NVFP4.row_bytes(expected.shape[1])
        assert (source.read_f32(key) == expected).all(), key
        assert (source.read_f32(key, range(3, 30)) == expected[3:30]).all()
        assert (source.read_f32(key, np.array([5, 1, 5, 0])) == expected[[5, 1, 5, 0]]).all()


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_experts(tmp_path, arch, stacked, kind):
    model = Tiny(n_experts=3, moe_intermediate=96, qk_norm=arch == "qwen3moe", seed=8)
    source = open_source(write_gguf(tmp_path / "m.gguf", model, arch, (kind,), stacked=stacked))
    assert len(source.tensors) == len(model.weights())
    for key in source.tensors:
        if key.expert >= 0:
            expected = model.weights()[hf_name(key)]
            assert (source.read(key) == blocks_of(expected, kind)).all()
            assert (source.read(key, range(32, 64), range(32)) == blocks_of(expected[32:64, :32], kind)).all()


def test_gate_and_up_experts_in_one_tensor(tmp_path):
    model = Tiny(n_experts=2, moe_intermediate=96, n_layers=1)
    at = "model.layers.0.mlp.experts"
    each = [
        np.concatenate([model.weights()[f"{at}.{expert}.{role}_proj.weight"] for role in ("gate", "up")])
        for expert in range(2)
    ]
    drop = ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")
    more = {"blk.0.ffn_gate_up_exps.weight": np.stack(each)}
    source = open_source(write_gguf(tmp_path / "m.gguf", model, drop=drop, more=more))
    for key in source.tensors:
        assert (source.read_f32(key) == model.weights()[hf_name(key)]).all()


def test_tied_and_untied_heads(tmp_path):
    model = Tiny()
    untied = open_source(write_gguf(tmp_path / "a.gguf", model))
    tied = open_source(write_gguf(tmp_path / "b.gguf", model, drop=("output.weight",)))
    assert not untied.config["tie_word_embeddings"]
    assert tied.config["tie_word_embeddings"]
    assert (untied.read_f32(Key("head")) == model.weights()["lm_head.weight"]).all()
    assert (tied.read_f32(Key("head")) == model.weights()["model.embed_tokens.weight"]).all()


def test_split_files(tmp_path):
    model = Tiny(seed=9)
    write_gguf(tmp_path / "m.gguf", model, split=5)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    for path in (parts[0], parts[-1], tmp_path):
        source = open_source(path)
        assert source.files == tuple(parts)
        for key in source.tensors:
            assert (source.read_f32(key) == model.weights()[hf_name(key)]).all()
    count = len(parts)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelError, match=f"is not part 2 of {count} of the model in"):
        open_source(parts[0])
    parts[1].unlink()
    with pytest.raises(
        ModelError, match=rf"is one of {count} parts, of which m-00002-of-{count:05d}\.gguf is missing"
    ):
        open_source(parts[0])
    renamed = parts[0].rename(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=rf"its name does not end in -00001-of-{count:05d}\.gguf"):
        open_source(renamed)


def test_directories_of_gguf_files(tmp_path):
    write_gguf(tmp_path / "a.gguf", Tiny())
    assert open_source(tmp_path).path == tmp_path / "a.gguf"
    write_gguf(tmp_path / "b.gguf", Tiny())
    with pytest.raises(ModelError, match="holds 2 GGUF files; give one of them"):
        open_source(tmp_path)


def test_a_gguf_file_beside_other_files(tmp_path):
    """As repositories of GGUF files come: with a configuration, and with what makes embeddings of images."""
    write_gguf(tmp_path / "a.gguf", Tiny())
    for name in ("mmproj-a-f16.gguf", "a.mmproj-Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert open_source(tmp_path).path == tmp_path / "a.gguf"


def test_a_split_file_in_a_directory(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"a-0000{number}-of-00003.gguf").touch()
    assert file_in(tmp_path) == tmp_path / "a-00001-of-00003.gguf"
    (tmp_path / "a-00001-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match=r"has a-00002-of-00003\.gguf, but not the first part"):
        file_in(tmp_path)


def test_quantize_is_for_unquantised_files(tmp_path):
    model = Tiny()
    source = open_source(write_gguf(tmp_path / "a.gguf", model, types=("BF16",)), "q8_0")
    key = Key("q", 1)
    expected = blocks_of(through("BF16", model.weights()[hf_name(key)]), "Q8_0")
    assert (source.read(key) == expected).all()
    for kind in ("Q4_1", "Q5_0"):
        path = write_gguf(tmp_path / f"{kind}.gguf", model, types=("F16", kind))
        with pytest.raises(JobError, match=f'is quantised already .*is {kind}.*; leave quantize = "none"'):
            open_source(path, "q8_0")


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
        ({"arch": "gptneox"}, "has architecture 'gptneox', which is not supported; mpillm models lists"),
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


def header_of(path: Path):
    file = MappedFile(path)
    try:
        return read_header(file)
    finally:
        file.close()


@pytest.mark.parametrize("alignment", [32, 256])
def test_header_agrees_with_the_library(tmp_path, alignment):
    extra = {"general.tags": ["a", "", "\u4e2d"], "general.x": [1.5, 2.5], "general.y": [True]}
    path = write_gguf(
        tmp_path / "m.gguf", Tiny(), types=("Q4_1", "F16", "Q5_0"), extra=extra, alignment=alignment
    )
    header, library = header_of(path), gguf.GGUFReader(path)
    fields = {
        name: field.contents() for name, field in library.fields.items() if not name.startswith("GGUF.")
    }
    assert header.metadata == fields
    assert list(header.tensors) == [tensor.name for tensor in library.tensors]
    for tensor in library.tensors:
        mine = header.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.stored.name, mine.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert mine.offset == tensor.data_offset


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(fields=(), tensors=(), version=3, n_fields=None, n_tensors=None, data=64) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(fields) if n_fields is None else n_fields)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data if data else 0)


REFUSED = {
    "magic": (b"GGUX" + bytes(40), "is not a GGUF file"),
    "short": (b"GGUF", "is not a GGUF file"),
    "version 1": (gguf_bytes(version=1), "has GGUF version 1; versions 2 and 3 can be read"),
    "version 4": (gguf_bytes(version=4), "has GGUF version 4"),
    "big endian": (gguf_bytes(version=3 << 24), "is a big-endian GGUF file"),
    "fields": (gguf_bytes(n_fields=2**60), f"it announces {2**60} metadata fields"),
    "tensors": (gguf_bytes(n_tensors=2**63), f"and {2**63} tensors"),
    "fields missing": (
        gguf_bytes([field(b"a", U32, bytes(4))], n_fields=2, data=0),
        "its header reaches beyond its end",
    ),
    "tensors missing": (gguf_bytes(n_tensors=9), "has 0 dimensions"),
    "name length": (gguf_bytes([struct.pack("<Q", 2**62)]), f"a metadata field has a length of {2**62}"),
    "name end": (gguf_bytes([struct.pack("<Q", 2**20)]), "its header reaches beyond its end"),
    "name text": (gguf_bytes([field(b"\xff", U32, bytes(4))]), "the name of a metadata field is not UTF-8"),
    "twice": (gguf_bytes([field(b"a", U32, bytes(4))] * 2), "metadata field 'a' is there twice"),
    "type": (gguf_bytes([field(b"a", 13, bytes(4))]), "metadata field 'a' has the unknown type 13"),
    "string": (gguf_bytes([field(b"a", STRING, struct.pack("<Q", 2**40))]), f"has a length of {2**40} bytes"),
    "nested": (gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "'a' is an array of arrays"),
    "items": (gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", 0, 2**40))]), f"announces {2**40} items"),
    "item type": (gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", 77, 1))]), "'a' has the unknown type 77"),
    "numbers": (gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", 10, 2**20))]), "reaches beyond its end"),
    "strings": (
        gguf_bytes([field(b"a", ARRAY, struct.pack("<IQ", STRING, 2**20))]),
        "more than the file can hold",
    ),
    "a string": (
        gguf_bytes([field(b"a", ARRAY, struct.pack("<IQQ", STRING, 2, 2**50))]),
        "'a' reaches beyond the end of the file",
    ),
    "last string": (
        gguf_bytes([field(b"a", ARRAY, struct.pack("<IQQ", STRING, 2, 20) + bytes(20))], data=0),
        "'a' reaches beyond the end of the file",
    ),
    "string text": (
        gguf_bytes([field(b"a", ARRAY, struct.pack("<IQQ", STRING, 1, 1) + b"\xff")]),
        "is not UTF-8",
    ),
    "alignment": (
        gguf_bytes([field(b"general.alignment", U32, struct.pack("<I", 24))]),
        "alignment is 24, which is",
    ),
    "alignment 0": (gguf_bytes([field(b"general.alignment", U32, bytes(4))]), "alignment is 0, which is"),
    "alignment type": (
        gguf_bytes([field(b"general.alignment", STRING, text(b"32"))]),
        "alignment is 32, which is",
    ),
    "dims": (gguf_bytes(tensors=[tensor(b"t", (1,) * 5)]), "tensor 't' has 5 dimensions"),
    "no dims": (gguf_bytes(tensors=[tensor(b"t", ())]), "tensor 't' has 0 dimensions"),
    "many dims": (
        gguf_bytes(tensors=[text(b"t") + struct.pack("<I", 2**32 - 1)]),
        "tensor 't' has 4294967295 dimensions",
    ),
    "size": (gguf_bytes(tensors=[tensor(b"t", (2**32, 2**32))]), "has the impossible shape"),
    "block type": (
        gguf_bytes(tensors=[tensor(b"t", kind=99)]),
        "tensor 't' has block type 99, which is unknown",
    ),
    "removed type": (
        gguf_bytes(tensors=[tensor(b"t", kind=4)]),
        "block type 4, which is unknown or cannot be",
    ),
    "integers": (
        gguf_bytes(tensors=[tensor(b"t", kind=26)]),
        "block type 26, which is unknown or cannot be decoded",
    ),
    "blocks": (gguf_bytes(tensors=[tensor(b"t", (48, 2), 2)]), "rows of 48 values, not whole blocks of Q4_0"),
    "offset": (gguf_bytes(tensors=[tensor(b"t", offset=4)]), "offset of tensor 't' is not a multiple of 32"),
    "beyond": (gguf_bytes(tensors=[tensor(b"t", offset=64)]), "tensor 't' reaches beyond its end"),
    "far": (gguf_bytes(tensors=[tensor(b"t", offset=2**64 - 32)]), "tensor 't' reaches beyond its end"),
    "overlap": (
        gguf_bytes(tensors=[tensor(b"t", (9,)), tensor(b"u", offset=32)], data=96),
        "tensor 'u' overlaps another one",
    ),
    "tensor twice": (
        gguf_bytes(tensors=[tensor(b"t"), tensor(b"t", offset=32)]),
        "tensor 't' is there twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_hostile_headers(tmp_path, case):
    data, words = REFUSED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError) as error:
        open_source(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_no_architecture(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes())
    with pytest.raises(ModelError, match="has no architecture; mpillm models lists those that are supported"):
        open_source(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    extra = {"tokenizer.ggml.tokens": ["a", "bc"], "tokenizer.ggml.scores": [0.5, 1.5]}
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    model = Tiny(hidden=32, n_layers=1, n_heads=2, n_kv_heads=1, intermediate=32, vocab=8)
    return write_gguf(path, model, types=("Q8_0", "F32"), extra=extra).read_bytes()


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_are_refused_or_sound(tmp_path_factory, sound, data):
    """Whatever bits flip in the header, and wherever the file ends: a ModelError, or tensors inside the file."""
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, 1500))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(1, len(damaged))) :]
    path = tmp_path_factory.mktemp("flip") / "m.gguf"
    path.write_bytes(damaged)
    try:
        source = open_source(path)
    except ModelError:
        return
    for key, info in source.tensors.items():
        if len(info.shape) == 2:
            source.read(key)
        source.read_f32(key)
    source.close()


@pytest.mark.parametrize("unset", [-1, 2**32 - 1])
def test_ids_that_are_not_set(tmp_path, unset):
    ids = {f"tokenizer.ggml.{name}_token_id": unset for name in ("bos", "eos", "eot")}
    config = config_of(tmp_path, extra=ids | {"tokenizer.ggml.eom_token_id": 3})
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, [3])
