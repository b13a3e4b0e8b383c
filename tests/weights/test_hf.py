from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mpillm import kernels
from mpillm.errors import JobError, ModelError
from mpillm.kernels.types import BlockType
from mpillm.model.opening import open_source
from mpillm.weights.identity import fingerprint
from mpillm.weights.roles import Key, hf_name
from mpillm.weights.source import column_unit
from tests.weights.build import DTYPES, Tiny, through, write_hf

MOE = Tiny(n_experts=3, moe_intermediate=40, qk_norm=True, dense_layers=(1,), seed=5)


def canonical(values: np.ndarray, dtype: str) -> np.ndarray:
    stored = np.ascontiguousarray(values.astype(DTYPES[dtype]))
    return stored.view(np.uint8).reshape(len(values), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_was_written(tmp_path, dtype, shards):
    model = Tiny(attention_bias=True, o_bias=True, mlp_bias=True, seed=1)
    source = open_source(write_hf(tmp_path / "m", model.weights(), model.config(), dtype, shards))
    random = np.random.default_rng(2)
    assert len(source.tensors) == len(model.weights())
    for key, info in source.tensors.items():
        expected = model.weights()[hf_name(key)]
        assert info.shape == expected.shape
        assert (info.stored, info.type) == (dtype, BlockType[dtype])
        assert info.nbytes == expected.size * info.type.block_bytes
        assert (source.read_f32(key) == through(dtype, expected)).all()
        if expected.ndim == 1:
            assert (source.read_f32(key, range(3, 9)) == through(dtype, expected)[3:9]).all()
            continue
        assert (source.read(key) == canonical(expected, dtype)).all()
        (top, bottom), (left, right) = (sorted(random.choice(size + 1, 2, False)) for size in expected.shape)
        rows, cols = range(top, bottom), range(left, right)
        assert (source.read(key, rows, cols) == canonical(expected[top:bottom, left:right], dtype)).all()
        ids = random.integers(0, len(expected), 7)
        assert (source.read_f32(key, ids) == through(dtype, expected[ids])).all()
    assert source.tokenizer == tmp_path / "m"
    assert source.config["hidden_size"] == 64
    assert column_unit(source) == 1
    source.close()


def test_tensors_that_lie_askew(tmp_path):
    """An F32 tensor behind an odd number of F16 values is not aligned in the file, but is when delivered."""
    model = Tiny(vocab=33, hidden=48, seed=3)
    tensors = {
        name: value.astype(np.float16) if value.ndim == 1 else value
        for name, value in model.weights().items()
    }
    path = write_hf(tmp_path, tensors, model.config())
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" " * 3
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    source = open_source(path)
    for key, info in source.tensors.items():
        if len(info.shape) == 2:
            assert source.read(key).ctypes.data % 4 == 0
            assert (source.read(key) == canonical(tensors[hf_name(key)], "F32")).all()


@pytest.mark.parametrize("style", ["each", "mixtral", "stacked", "fused"])
def test_experts_of_every_style(tmp_path, style):
    weights = dict(MOE.weights())
    at = "model.layers.0.mlp."
    if style == "mixtral":
        new = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        for expert in range(3):
            for role, short in new.items():
                value = weights.pop(f"{at}experts.{expert}.{role}.weight")
                weights[f"model.layers.0.block_sparse_moe.experts.{expert}.{short}.weight"] = value
        weights["model.layers.0.block_sparse_moe.gate.weight"] = weights.pop(at + "gate.weight")
    elif style in {"stacked", "fused"}:
        stack = {
            role: np.stack([weights.pop(f"{at}experts.{expert}.{role}_proj.weight") for expert in range(3)])
            for role in ("gate", "up", "down")
        }
        weights[at + "experts.down_proj"] = stack["down"]
        if style == "fused":
            weights[at + "experts.gate_up_proj"] = np.concatenate([stack["gate"], stack["up"]], axis=1)
        else:
            weights |= {f"{at}experts.{role}_proj": stack[role] for role in ("gate", "up")}
    source = open_source(write_hf(tmp_path, weights, MOE.config()))
    assert len(source.tensors) == len(MOE.weights())
    for key in source.tensors:
        assert (source.read_f32(key) == MOE.weights()[hf_name(key)]).all()


def test_base_model_names_and_old_buffers(tmp_path):
    weights = {name.removeprefix("model."): value for name, value in Tiny(tied=True).weights().items()}
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    source = open_source(write_hf(tmp_path, weights, Tiny(tied=True).config()))
    assert (source.read_f32(Key("head")) == weights["embed_tokens.weight"]).all()
    assert len(source.tensors) == len(weights)


@pytest.mark.parametrize(
    ("tied", "drop", "head", "embed"),
    [
        (True, ["lm_head.weight"], "model.embed_tokens.weight", "model.embed_tokens.weight"),
        (True, ["model.embed_tokens.weight"], "lm_head.weight", "lm_head.weight"),
        (True, [], "lm_head.weight", "model.embed_tokens.weight"),
        (False, [], "lm_head.weight", "model.embed_tokens.weight"),
        (False, ["lm_head.weight"], None, "model.embed_tokens.weight"),
    ],
)
def test_tied_heads_as_transformers_ties_them(tmp_path, tied, drop, head, embed):
    model = Tiny()
    weights = {name: value for name, value in model.weights().items() if name not in drop}
    source = open_source(write_hf(tmp_path, weights, model.config() | {"tie_word_embeddings": tied}))
    assert (source.read_f32(Key("embed")) == weights[embed]).all()
    if head is None:
        assert Key("head") not in source.tensors
    else:
        assert (source.read_f32(Key("head")) == weights[head]).all()


@pytest.mark.parametrize("quantize", ["q8_0", "q4_0"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_quantising_while_reading(tmp_path, quantize, dtype):
    model = Tiny(n_experts=2, moe_intermediate=64, intermediate=80, tied=True, attention_bias=True, seed=4)
    path = write_hf(tmp_path, model.weights(), model.config(), dtype)
    source, plain = open_source(path, quantize), open_source(path)
    block = BlockType[quantize.upper()]
    assert (column_unit(source), column_unit(plain)) == (32, 1)
    for key, info in source.tensors.items():
        assert info.stored == dtype
        assert (source.read_f32(key) == plain.read_f32(key)).all()  # rows that are looked up stay as they are
        if len(info.shape) == 1 or key.role in {"router", "embed"}:
            assert info.type == (BlockType.F32 if key.role == "router" else BlockType[dtype])
            continue
        assert info.type == block
        values = plain.read_f32(key)
        k = values.shape[1]
        expected = np.empty((len(values), block.row_bytes(k)), np.uint8)
        kernels.quantize(block, values, expected, 1)
        assert (source.read(key) == expected).all()
        cut = expected[5:20, block.block_bytes : 2 * block.block_bytes]
        assert (source.read(key, range(5, 20), range(32, 64)) == cut).all()
        assert (source.read(key, cols=range(32, k)) == expected[:, block.block_bytes :]).all()
    assert Key("head") in source.tensors


def test_unknown_quantize(tmp_path):
    path = write_hf(tmp_path, Tiny().weights(), Tiny().config())
    with pytest.raises(JobError, match='quantize = "q5_0" is unknown; it must be one of none, q8_0, q4_0'):
        open_source(path, "q5_0")


def test_the_end_of_text_is_the_generation_configs(tmp_path):
    path = write_hf(tmp_path, Tiny().weights(), Tiny().config() | {"eos_token_id": 2})
    assert open_source(path).config["eos_token_id"] == 2
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.6}')
    source = open_source(path)
    assert source.config["eos_token_id"] == [2, 7]
    assert "temperature" not in source.config
    assert path / "generation_config.json" in source.files


def test_single_file_goes_before_the_index(tmp_path):
    path = write_hf(tmp_path, Tiny().weights(), Tiny().config())
    (path / "model.safetensors.index.json").write_text("nonsense")
    assert len(open_source(path).tensors) == len(Tiny().weights())


def index_of(path, weight_map) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_refuses_bad_indexes(tmp_path):
    model = Tiny()
    path = write_hf(tmp_path / "m", model.weights(), model.config(), shards=2)
    good = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    name, shard = next(iter(good.items()))
    shutil.copy(path / shard, tmp_path / shard)
    for target in ("../" + shard, str(tmp_path / shard), "..", "", 3, "sub/x.safetensors"):
        index_of(path, good | {name: target})
        with pytest.raises(ModelError, match="which is not a file of"):
            open_source(path)
    for target in ("config.json", "a\\b.safetensors", "a\0.safetensors"):
        index_of(path, good | {name: target})
        with pytest.raises(ModelError, match="which is not a safetensors file"):
            open_source(path)
    index_of(path, good | {name: "other.safetensors"})
    with pytest.raises(
        ModelError, match=r"names other\.safetensors, which is missing; fetch the model again"
    ):
        open_source(path)
    index_of(path, good | {"model.layers.9.mlp.up_proj.weight": shard})
    with pytest.raises(ModelError, match=f"into {shard}, which does not contain it"):
        open_source(path)
    for weight_map in ({}, [1], None):
        index_of(path, weight_map)
        with pytest.raises(ModelError, match="has no weight_map"):
            open_source(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_source(path)


def test_refuses_bad_directories(tmp_path):
    with pytest.raises(
        ModelError, match="does not exist or cannot be accessed; give a Hugging Face directory or a GGUF"
    ):
        open_source(tmp_path / "none")
    with pytest.raises(ModelError, match=r"has no config\.json: it is not a complete Hugging Face model"):
        open_source(tmp_path)
    config = tmp_path / "config.json"
    for text in ("{", "[" * 10_000, '{"a": ' + "1" * 10_000 + "}"):
        config.write_text(text)
        with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
            open_source(tmp_path)
    config.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        open_source(tmp_path)
    config.write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json is not a JSON object"):
        open_source(tmp_path)
    with config.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelError, match="larger than 64 MiB"):
        open_source(tmp_path)
    config.unlink()
    config.mkdir()
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model.layers.0.self_attn.nothing": np.ones(4, np.float32)},
            "'model.layers.0.self_attn.nothing' belongs to no",
        ),
        ({"model.norm.weight": np.ones(64, np.int64)}, "model.norm.weight has dtype I64; F32, F16 and BF16"),
        (
            {"model.norm.weight": np.ones((1, 64), np.float32)},
            "has shape [1, 64], but must have 1 dimensions",
        ),
        ({"lm_head.weight": np.ones(64, np.float32)}, "has shape [64], but must have 2 dimensions"),
        ({"lm_head.weight": np.ones((0, 64), np.float32)}, "has shape [0, 64], whose rows"),
        ({"norm.weight": np.ones(64, np.float32)}, "are the same weights"),
        (
            {"model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 5, 64), np.float32)},
            "5 rows, which are not 2",
        ),
    ],
)
def test_refuses_bad_tensors(tmp_path, change, words):
    path = write_hf(tmp_path, Tiny().weights() | change, Tiny().config())
    with pytest.raises(ModelError) as error:
        open_source(path)
    assert words in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_fingerprint_tells_models_apart(tmp_path):
    model = Tiny(vocab=4000)
    path = write_hf(tmp_path / "m", model.weights(), model.config(), shards=2)
    first = fingerprint(open_source(path))
    assert first[0] == sum(file.stat().st_size for file in path.iterdir())
    assert fingerprint(open_source(path)) == first
    copy = shutil.copytree(path, tmp_path / "copy")
    assert fingerprint(open_source(copy)) == first
    shard = next(copy.glob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    changed = fingerprint(open_source(copy))
    assert changed[0] == first[0]
    assert changed[1] != first[1]
    shard.write_bytes(data)
    (copy / "config.json").write_text((path / "config.json").read_text().replace("1e-05", "2e-05"))
    assert fingerprint(open_source(copy))[1] != first[1]
    shard.unlink()
    with pytest.raises(ModelError, match="which is missing"):
        open_source(copy)


def test_fingerprint_of_a_file_that_went_away(tmp_path):
    source = open_source(write_hf(tmp_path, Tiny().weights(), Tiny().config()))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        fingerprint(source)
