from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mpillm import kernels
from mpillm.errors import ModelError
from mpillm.kernels.types import BlockType
from mpillm.model.opening import open_source
from mpillm.partition.grid import Place
from mpillm.weights.fill import CHUNK, load
from mpillm.weights.inventory import all_tensors
from mpillm.weights.io.reading import new_buffer
from mpillm.weights.plan import ALIGNMENT
from mpillm.weights.roles import Key
from mpillm.weights.source import check_tensors, column_unit, rank_plans
from tests.weights.build import Tiny, through, write_gguf, write_hf

DENSE = Tiny(n_layers=3, attention_bias=True, o_bias=True, mlp_bias=True, intermediate=264, vocab=130, seed=1)
ODD = Tiny(hidden=72, n_heads=9, n_kv_heads=3, head_dim=8, intermediate=100, vocab=50, tied=True, seed=2)
MOE = Tiny(
    n_experts=3, moe_intermediate=256, intermediate=288, qk_norm=True, dense_layers=(1,), n_heads=8, seed=3
)
WIDE = Tiny(
    hidden=288, n_heads=16, n_kv_heads=2, head_dim=32, intermediate=320, n_layers=2, tied=True, seed=4
)


def hf(path: Path, model: Tiny, dtype: str = "F32", quantize: str = "none"):
    config = model.config()
    return open_source(write_hf(path, model.weights(), config, dtype), quantize)


def gguf(path: Path, model: Tiny, arch: str, *types: str):
    return open_source(write_gguf(path / "m.gguf", model, arch, types))


CASES = {
    "dense F32": (DENSE, lambda path: hf(path, DENSE)),
    "dense BF16": (DENSE, lambda path: hf(path, DENSE, "BF16")),
    "odd F16": (ODD, lambda path: hf(path, ODD, "F16")),
    "odd quantised": (ODD, lambda path: hf(path, ODD, "F32", "q8_0")),
    "experts": (MOE, lambda path: hf(path, MOE)),
    "experts quantised": (MOE, lambda path: hf(path, MOE, "BF16", "q4_0")),
    "wide mixed GGUF": (WIDE, lambda path: gguf(path, WIDE, "llama", "Q4_0", "F16", "Q4_1")),
    "wide Q5 GGUF": (WIDE, lambda path: gguf(path, WIDE, "qwen2", "Q5_0", "BF16")),
}


def names_of(model, layers):
    """What the parts of these layers are called, in the order in which a step uses them."""
    experts = [f"expert {number}" for number in range(model.n_experts)]
    return [
        f"layer {layer}, {part}"
        for layer in layers
        for part in ("attention", *(experts if model.moe_layers[layer] else ["gate", "up", "down"]))
    ]


def loaded(plan, source, chunk=CHUNK):
    return load(plan, source, new_buffer(plan.nbytes, ALIGNMENT), chunk=chunk)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 4 * 2**20])
def test_what_a_rank_holds(tmp_path, case, chunk):
    """Every shard's matrices are the packed slices of the whole ones; together the shards have every row and column."""
    model, make = CASES[case]
    source = make(tmp_path)
    config = model.model(column_unit(source))
    check_tensors(source, config)
    declared = {tensor.key: tensor for tensor in all_tensors(config)}
    maximum = config.max_shards
    for shards in [n for n in (1, 2, 4, 8) if n <= maximum]:
        seen: dict[Key, int] = {}
        for rank in range(shards):
            plans = rank_plans(config, Place(rank, 1, shards), source)
            assert [plan.name for plan in plans] == [
                *names_of(model, range(model.n_layers)),
                "the output head",
            ]
            for plan in plans:
                layer = loaded(plan, source, chunk)  # down to a single tile of rows at a time
                for entry in plan.entries:
                    key = entry.key
                    seen[key] = seen.get(key, 0) + entry.n * entry.k
                    if not entry.bounds:
                        assert (layer.vector(key.role) == source.read_f32(key, entry.rows)).all()
                        continue
                    matrix = layer.matrix(key.role)
                    assert (matrix.type, matrix.n, matrix.k) == (source.tensors[key].type, entry.n, entry.k)
                    assert matrix.bounds.dtype == np.int32
                    assert matrix.data.ctypes.data % 64 == 0
                    canonical = source.read(key, entry.rows, entry.cols)
                    expected = np.empty(
                        kernels.packed_nbytes(matrix.type, matrix.n, matrix.k, matrix.bounds), np.uint8
                    )
                    kernels.pack(matrix.type, canonical, matrix.k, matrix.bounds, expected, 1)
                    assert (matrix.data == expected).all()
        for key, count in seen.items():
            size = int(np.prod(source.tensors[key].shape))
            cut = declared[key]
            if cut.rows is None and cut.cols is None:
                assert count == size * shards
            elif cut.rows is not None and cut.rows.share > 1:
                assert count >= size
            else:
                assert count == size


def test_stages_hold_their_layers(tmp_path):
    source = hf(tmp_path, DENSE)
    names = [
        [plan.name for plan in rank_plans(DENSE.model(1), Place(rank, 2, 1), source)] for rank in range(2)
    ]
    assert names == [names_of(DENSE, [0, 1]), [*names_of(DENSE, [2]), "the output head"]]


def test_products_with_a_loaded_matrix(tmp_path):
    source = hf(tmp_path, ODD, "BF16")
    plan = rank_plans(ODD.model(1), Place(0, 1, 1), source)[3]
    down = loaded(plan, source).matrix("down")
    x = np.random.default_rng(0).standard_normal((3, down.k), np.float32)
    out = np.empty((3, down.n), np.float32)
    kernels.matmul(down.type, down.data, down.n, down.k, down.bounds, x, out, 1)
    expected = through("BF16", x) @ through("BF16", ODD.weights()["model.layers.0.mlp.down_proj.weight"]).T
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_quantised_though_the_embedding_is_not(tmp_path):
    source = hf(tmp_path, ODD, "F32", "q4_0")
    head = rank_plans(ODD.model(32), Place(0, 1, 1), source)[-1]
    assert head.index["head"][0].type is BlockType.Q4_0
    ids = np.array([3, 49])
    assert (source.read_f32(Key("embed"), ids) == ODD.weights()["model.embed_tokens.weight"][ids]).all()


@pytest.mark.parametrize(
    ("change", "drop", "words"),
    [
        (
            {},
            "model.layers.2.mlp.up_proj.weight",
            "has no tensor for up of layer 2; the model is not complete",
        ),
        ({}, "model.layers.0.self_attn.k_proj.bias", "has no tensor for k_bias of layer 0"),
        ({}, "lm_head.weight", "has no tensor for head; the model"),
        ({}, "model.embed_tokens.weight", "has no tensor for embed;"),
        ({"hidden": 60}, "", "embed has shape [130, 64], but the configuration makes it [130, 60]"),
        (
            {"intermediate": 256},
            "",
            "gate of layer 0 has shape [264, 64], but the configuration makes it [256, 64]",
        ),
        ({"n_kv_heads": 4}, "", "k of layer 0 has shape [32, 64], but the configuration makes it [64, 64]"),
        ({"n_layers": 2}, "", "has attn_norm of layer 2, which its configuration does not have"),
        ({"o_bias": False}, "", "has o_bias of layer 0, which its configuration does not have"),
        ({"n_experts": 2}, "", "has no tensor for router of layer 0"),
    ],
)
def test_tensors_must_be_those_of_the_configuration(tmp_path, change, drop, words):
    weights = {name: value for name, value in DENSE.weights().items() if name != drop}
    source = open_source(write_hf(tmp_path, weights, DENSE.config()))
    model = dataclasses.replace(DENSE, **change)
    with pytest.raises(ModelError) as error:
        check_tensors(source, model.model(1))
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_loading_takes_little_memory_besides_the_buffer(tmp_path):
    model = Tiny(hidden=512, n_heads=8, head_dim=64, intermediate=8192, n_layers=1, vocab=64)
    source = hf(tmp_path, model, "BF16", "q8_0")
    plan = rank_plans(model.model(32), Place(0, 1, 1), source)[3]
    buffer = new_buffer(plan.nbytes, ALIGNMENT)
    load(plan, source, buffer, chunk=2**16)
    tracemalloc.start()
    load(plan, source, buffer, chunk=2**16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.nbytes > 4_000_000
    assert peak < 32 * 2**16  # the NumPy kernels take most of it; the matrix as float32 has 16 MB


@pytest.mark.parametrize(("arch", "quantize"), [("llama", "none"), ("qwen2", "none"), ("bf16", "q8_0")])
def test_rows_go_from_the_file_to_their_place_in_one_go(tmp_path, monkeypatch, arch, quantize):
    """No copy is made of them, cut by columns, in llama.cpp's order or quantised; a tensor is packed by one call."""
    model = Tiny(hidden=1024, n_heads=8, n_kv_heads=8, head_dim=128, intermediate=2048, n_layers=1)
    source = (
        hf(tmp_path, model, "BF16", quantize)
        if arch == "bf16"
        else gguf(tmp_path, model, arch, "Q8_0", "Q4_0")
    )
    if kernels.path() == "numpy":
        pytest.skip("NumPy's twin makes copies")
    plans = rank_plans(model.model(32), Place(1, 1, 2), source)
    buffers = [new_buffer(plan.nbytes, ALIGNMENT) for plan in plans]
    calls = []
    for of, name in ((kernels, "pack"), (source, "release")):
        plain = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *a, plain=plain, name=name: (calls.append(name), plain(*a)))
    tracemalloc.start()
    for plan, buffer in zip(plans, buffers, strict=True):
        load(plan, source, buffer, chunk=2**22)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 128 * 1024  # the smallest matrix has 278528 bytes
    entries = [entry for plan in plans for entry in plan.entries]
    assert calls.count("pack") == sum(bool(entry.bounds) for entry in entries)
    assert calls.count("release") == len(entries)


def mapped_kib(path: Path) -> int:
    """KiB of a file that this process has in memory through a mapping."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and head[0] == "Rss:":
            total += int(head[1])
    return total


def test_pages_are_given_back(tmp_path):
    model = Tiny(hidden=256, n_heads=8, head_dim=32, intermediate=1024, n_layers=2, vocab=4000)
    source = hf(tmp_path, model)
    file = tmp_path / "model.safetensors"
    plans = rank_plans(model.model(1), Place(0, 1, 1), source)
    key = Key("gate", 0)
    assert source.read(key).sum() > 0
    assert mapped_kib(file) >= 1024
    source.release(key)
    for plan in plans:
        loaded(plan, source)
    before = mapped_kib(file)
    assert (source.read_f32(Key("embed"), np.arange(0, 4000, 7)) != 0).any()
    assert mapped_kib(file) == before <= 256  # the kernel maps some pages around each one that is touched
    source.read_past_cache()
    for vector in (key for key, info in source.tensors.items() if len(info.shape) == 1):
        assert np.isfinite(source.read_f32(vector)).all()
        assert mapped_kib(file) <= before
    source.close()
    assert mapped_kib(file) == 0


def test_single_rows_are_those_of_the_file_that_was_opened(tmp_path):
    source, random = hf(tmp_path, Tiny(n_layers=1, vocab=4000)), np.random.default_rng(4)
    key, path = Key("embed"), tmp_path / "model.safetensors"
    whole = source.read_f32(key)
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)  # before the first row is asked for
    with pytest.raises(ModelError, match=r"model\.safetensors was shortened or changed while it was in use"):
        source.read_f32(key, np.array([5]))
    source.close()
    source = hf(tmp_path, Tiny(n_layers=1, vocab=4000))
    for rows in (1, 32, 500):
        asked = random.integers(0, 4000, rows)
        assert (source.read_f32(key, asked) == whole[asked]).all()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ModelError, match="was shortened or changed while it was in use"):
        source.read_f32(key, np.arange(4000))
    source.close()
