"""The tensors of GGUF files: which types stay as they are, and what the others become."""

from __future__ import annotations

import tracemalloc
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest

from mpillm import kernels
from mpillm.errors import JobError, ModelError
from mpillm.kernels.types import BlockType
from mpillm.model.opening import open_source
from mpillm.weights.formats import stored as types_of_files
from mpillm.weights.formats.loaders import LOADING_NBYTES
from mpillm.weights.formats.stored import stored_in_gguf
from mpillm.weights.opening import file_in
from mpillm.weights.plan import PagePlan, plan_entry
from mpillm.weights.roles import Key, hf_name
from mpillm.weights.source import column_unit
from tests.weights.build import Tiny, through, write_gguf

OWN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "MXFP4", "Q5_0", "Q5_1")


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


def write_embedding(path: Path, blocks: np.ndarray, kind: gguf.GGMLQuantizationType) -> Path:
    """A file whose only matrix is that of the tokens, in these blocks."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    hidden = blocks.shape[1] // size * block
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 8, "embedding_length": hidden, "feed_forward_length": 8}
    for name, value in (sizes | {"attention.head_count": 4}).items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decodable() -> list[str]:
    kinds = (stored_in_gguf(int(kind)) for kind in gguf.GGMLQuantizationType)
    return sorted(kind.name for kind in kinds if kind and not kind.own)


def test_kinds_that_can_be_decoded():
    assert {"IQ1_S", "TQ2_0", "NVFP4"} <= set(decodable())
    for kind in gguf.GGMLQuantizationType:
        if (stored := stored_in_gguf(int(kind))) is not None:
            sizes = stored.block, stored.block_bytes
            assert (stored.name, sizes) == (kind.name, gguf.GGML_QUANT_SIZES[kind])
            own = types_of_files.OWN.get(kind.name)
            assert stored.own == (own is not None and not own.type.scaled)
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
    path = write_embedding(tmp_path / "m.gguf", raw & np.uint8(0x3B), stored)
    source = open_source(path)
    info = source.tensors[Key("head")]
    assert (info.stored, info.type, info.shape) == (kind, BlockType.Q8_0, (model.vocab, 512))
    assert np.isfinite(values).all()
    assert (source.read_f32(Key("embed"), np.array([3, 3, 39])) == values[[3, 3, 39]]).all()
    expected = np.empty((40, 512 // 32 * 34), np.uint8)
    kernels.quantize(BlockType.Q8_0, values, expected, 1)
    assert (source.read(Key("head")) == expected).all()
    assert (source.read(Key("head"), range(4, 21), range(96, 288)) == expected[4:21, 3 * 34 : 9 * 34]).all()


@pytest.mark.parametrize("threads", [1, 4, 16])
def test_decoding_by_the_library_takes_what_is_planned(tmp_path: Path, threads: int) -> None:
    """All threads together hold no more float values than the plan counts, whatever few bits they are stored in."""
    stored = gguf.GGMLQuantizationType.TQ2_0
    block, size = gguf.GGML_QUANT_SIZES[stored]
    raw = np.zeros((12_000, 2048 // block * size), np.uint8)
    path = write_embedding(tmp_path / "m.gguf", raw, stored)
    with closing(open_source(path)) as source:
        key = Key("head")
        entry = plan_entry(key, range(12_000), range(2048), (0, 2048), BlockType.Q8_0, 0)
        page = PagePlan("head", (entry,), entry.nbytes)
        with closing(source.open_loader("auto", threads, [page], False)) as loader:
            buffer = loader.allocate(page, [])
            tracemalloc.start()
            loader.load(page, buffer)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak < LOADING_NBYTES


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
    with pytest.raises(
        ModelError, match=rf"is one of {count} parts, of which m-00001-of-{count:05d}\.gguf is missing"
    ):
        open_source(parts[-1])


def test_directories_of_gguf_files(tmp_path):
    write_gguf(tmp_path / "a.gguf", Tiny())
    assert open_source(tmp_path).path == tmp_path / "a.gguf"
    write_gguf(tmp_path / "b.gguf", Tiny())
    with pytest.raises(ModelError, match="holds 2 GGUF files; give the path of one"):
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
    path = write_gguf(tmp_path / "b.gguf", model, types=("Q5_0",))
    again = open_source(path, "q4_0", again=True)  # as a draft model is
    values = through("Q5_0", model.weights()[hf_name(key)])
    expected = np.empty((len(values), BlockType.Q4_0.row_bytes(values.shape[1])), np.uint8)
    kernels.quantize(BlockType.Q4_0, values, expected)
    assert again.tensors[key].type == BlockType.Q4_0
    assert (again.read(key) == expected).all()
