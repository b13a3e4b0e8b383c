"""Packing, and packed models: the same bytes as the unpacked run, whatever loader, budget and policy."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpillm import kernels
from mpillm.errors import JobError, ModelError
from mpillm.kernels import BlockType
from mpillm.model.opening import config_of, open_source, open_unpacked
from mpillm.partition.grid import Place
from mpillm.tools.pack import PackedType
from mpillm.weights.formats.in_place import InPlaceLoader
from mpillm.weights.inventory import HEAD
from mpillm.weights.io import verified
from mpillm.weights.io.filesystem import network_kind
from mpillm.weights.io.reading import DirectFile
from mpillm.weights.io.verified import VerifiedFile
from mpillm.weights.names import USUAL
from mpillm.weights.packed import files as packed_files
from mpillm.weights.packed import loaders
from mpillm.weights.packed.file_plan import PackedPage
from mpillm.weights.packed.files import PackedPiece, Writer
from mpillm.weights.packed.loaders import MappedLoader, ReadLoader
from mpillm.weights.paging.loaders import Kind
from mpillm.weights.paging.weights import minimum_budget
from mpillm.weights.roles import Key
from mpillm.weights.source import rank_plans
from tests.conftest import Mpi
from tests.model.checks import EXACT, check, requests_of
from tests.model.engine_harness import run_engine
from tests.model.golden import golden
from tests.tools.packing import content, expected, model_path, outcome, packed
from tests.weights.residency import resident

EVERY = [
    "llama3",
    "llama_bias",
    "mixtral",
    "qwen3_moe",
    "smol_bf16",
    "llama_mixed.gguf",
    "llama_kquants.gguf",
    "gpt_oss_mxfp4",
    "gptoss_mxfp4.gguf",
]


PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("name", EVERY)
def test_packed_is_as_unpacked(tmp_path: Path, name: str) -> None:
    packed(name, tmp_path / "p")
    assert outcome(tmp_path / "p", name) == expected(name)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe"])
def test_a_mixture_in_bf16_packed_as_f32_is_that_mixture_in_f32(tmp_path: Path, name: str) -> None:
    """Also its routers: products with BF16 would round what they see, and other experts would be chosen."""
    for folder, dtype in (("bf16", ml_dtypes.bfloat16), ("f32", np.float32)):
        shutil.copytree(model_path(name), tmp_path / folder)
        weights = load_file(model_path(name) / "model.safetensors")
        rounded = {key: value.astype(ml_dtypes.bfloat16).astype(dtype) for key, value in weights.items()}
        save_file(rounded, tmp_path / folder / "model.safetensors")
    packed(tmp_path / "bf16", tmp_path / "p", "f32")
    assert outcome(tmp_path / "p", name) == outcome(tmp_path / "f32", name)
    for quantize in ("none", "q8_0", "w8a8", "bf16"):
        with closing(open_unpacked(tmp_path / "bf16", quantize)) as source:
            routers = {info.type for key, info in source.tensors.items() if "router" in key.role}
            assert routers == {BlockType.F32}


@pytest.mark.parametrize("loader", ["mmap", "read"])
@pytest.mark.parametrize(("name", "policy"), [("llama3", "cycle"), ("llama3", "lru"), ("qwen3_moe", "cycle")])
def test_any_loader_budget_and_policy(tmp_path: Path, loader: str, name: str, policy: str) -> None:
    """Also the least budget there is: two parts (and two experts), one in use and the next on its way."""
    packed(name, tmp_path / "p")
    with closing(open_source(tmp_path / "p")) as source:
        config = config_of(source)
        items = rank_plans(config, Place(0, 1, 1), source)
    minimum, total = minimum_budget(items), sum(item.nbytes for item in items)
    for budget in (minimum, (minimum + total) // 2) if loader == "mmap" else (minimum,):
        job = {"weights": budget, "loader": loader, "policy": policy}
        assert outcome(tmp_path / "p", name, **job) == expected(name)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3moe_q8_0.gguf"])
def test_experts_are_paged_from_any_source(name: str) -> None:
    with closing(open_source(model_path(name))) as source:
        config = config_of(source)
        items = rank_plans(config, Place(0, 1, 1), source)
    for budget in (minimum_budget(items), sum(item.nbytes for item in items) - 1):
        assert outcome(model_path(name), name, weights=budget) == expected(name)


@pytest.mark.parametrize(
    "name", ["smol_bf16", "llama_f16", "qwen3_moe", "qwen3_bf16.gguf", "llama_f16_factors.gguf"]
)
def test_floats_that_stay_are_used_where_they_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory is taken for them and none is packed, but for what is in another order or cut by columns."""
    path = model_path(name)
    assert outcome(path, name) == outcome(path, name, loader="read")
    calls: list[BlockType] = []
    plain = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda type, *a: (calls.append(type), plain(type, *a)))
    for shards in (1, 2):
        with closing(open_source(path)) as source:
            config = config_of(source)
            pages = rank_plans(config, Place(0, 1, shards), source)
            here, packed = (
                source.open_loader("auto", 1, pages, False),
                source.open_loader("read", 1, pages, False),
            )
            assert isinstance(here, InPlaceLoader)
            assert not isinstance(packed, InPlaceLoader)
            with closing(here), closing(packed):
                for plan in pages:
                    calls.clear()
                    layer = here.load(plan, here.allocate(plan, []))
                    beside = [entry for entry in plan.entries if source.in_place(entry) is None]
                    assert len(calls) == sum(bool(entry.bounds) for entry in beside)
                    assert layer.buffer.nbytes < sum(entry.nbytes for entry in beside) + 64 * len(beside) + 64
                    again = packed.load(plan, packed.allocate(plan, []))
                    for entry in plan.entries:
                        if not entry.bounds:
                            continue
                        cut = entry.key.role in ("o", "down") and shards > 1
                        permuted = (
                            name.startswith("llama_") and name.endswith("gguf") and entry.key.role in "qk"
                        )
                        assert (entry in beside) == (cut or permuted), entry.key
                        a, b = layer.matrix(entry.key.role), again.matrix(entry.key.role)
                        x = np.random.default_rng(0).standard_normal((2, entry.k)).astype(np.float32)
                        outs = np.empty((2, 2, entry.n), np.float32)
                        for one, out in zip((a, b), outs, strict=True):
                            kernels.matmul(
                                one.type, one.data, one.n, one.k, one.bounds, x, out, 1, True, one.row_bytes
                            )
                        assert (outs[0] == outs[1]).all()
                    del a, b, one, layer, again


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_quantised_while_packed_is_as_quantised_while_paged_in(tmp_path: Path, weights: PackedType) -> None:
    packed("smol_bf16", tmp_path / "p", weights)
    assert outcome(tmp_path / "p", "smol_bf16") == expected("smol_bf16", weights)


def test_bf16_as_f32_takes_activations_as_they_are(tmp_path: Path) -> None:
    """The values are the same; what is multiplied with them is not rounded any more."""
    packed("smol_bf16", tmp_path / "p", "f32")
    reference = golden("smol_bf16")
    check(reference, run_engine(tmp_path / "p", requests_of(reference), activations="f32"), EXACT)


@pytest.mark.parametrize("name", ["llama_mixed.gguf", "qwen3_moe"])
def test_every_piece_is_the_tensor_it_says(tmp_path: Path, name: str) -> None:
    """Another reader: the safetensors library, docs/packed.md, and NumPy."""
    packed(name, tmp_path / "p")
    seen = 0
    with closing(open_source(model_path(name))) as source:
        for path in sorted((tmp_path / "p").glob("*.safetensors")):
            raw = path.read_bytes()
            length = int.from_bytes(raw[:8], "little")
            metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
            assert (8 + length) % 4096 == 0
            assert hashlib.sha256(raw[8 + length :]).hexdigest() == metadata["sha256"]
            arrays = load_file(path)
            for piece in json.loads(metadata.get("pieces", "[]")):
                panel = arrays[piece["panel"]]
                for expert, row in enumerate(panel if panel.ndim == 2 else [panel]):
                    parsed = USUAL.parse_hf(piece["tensor"].replace("*", str(expert)))
                    assert parsed is not None
                    key = Key(parsed.roles[0], parsed.layer, parsed.expert)
                    values = decoded(piece, row[piece["offset"] :][: piece["nbytes"]])
                    rows, cols = range(*piece["rows"]), range(*piece["cols"])
                    if piece["bounds"]:
                        canonical = source.read(key, rows, cols)
                        whole = np.empty((len(rows), len(cols)), np.float32)
                        kernels.dequantize(BlockType[piece["type"]], canonical, len(cols), whole)
                    else:
                        whole = source.read_f32(key, rows)
                    assert (values == whole).all(), piece
                    seen += 1
        with closing(open_source(tmp_path / "p")) as again:
            ids = np.array([5, 0, 5, 19])
            assert (again.read_f32(Key("embed"), ids) == source.read_f32(Key("embed"), ids)).all()
    assert seen > 50


def decoded(piece: dict[str, Any], data: np.ndarray) -> np.ndarray:
    """The values of a piece, by the tables of docs/packed.md."""
    n, type = piece["rows"][1] - piece["rows"][0], piece["type"]
    if not piece["bounds"]:
        return data.view("<f4")
    tiles, panels = -(-n // 16), []
    for left, right in itertools.pairwise(piece["bounds"]):
        width = right - left
        if type in PLAIN:
            dtype = np.dtype(PLAIN[type])
            size = n * width * dtype.itemsize
            values = data[:size].view(dtype)
        elif type.endswith("_K"):
            size = tiles * width // 256 * 16 * {"Q4_K": 148, "Q5_K": 180, "Q6_K": 210}[type]
            values = decoded_k(type, data[:size].reshape(tiles, width // 256, -1))
        else:
            half = {"Q8_0": 32 + 512, "Q4_0": 32 + 256, "Q4_1": 64 + 256}[type]
            size = tiles * width // 32 * half
            blocks = data[:size].reshape(tiles, width // 32, half)
            at = 64 if type == "Q4_1" else 32
            scale = blocks[..., :32].copy().view("<f2").astype(np.float32)[..., None]
            low = blocks[..., at:].reshape(tiles, width // 32, -1, 16, 4).swapaxes(2, 3)
            q = low.reshape(tiles, width // 32, 16, -1)
            if type == "Q8_0":
                values = scale * q.view(np.int8)
            else:
                q = np.concatenate([q & 15, q >> 4], axis=-1).astype(np.float32)
                minimum = blocks[..., 32:64].copy().view("<f2").astype(np.float32)[..., None]
                values = scale * (q - 8) if type == "Q4_0" else scale * q + minimum
            values = values.swapaxes(1, 2)
        panels.append(values.reshape(-1, width)[:n].astype(np.float32))
        data = data[size:]
    return np.concatenate(panels, axis=1)


def decoded_k(type: str, blocks: np.ndarray) -> np.ndarray:
    """Values [tile, row, column] of K-quants' blocks [tile, block, bytes]."""
    tiles, count = blocks.shape[:2]

    def scale(at: int) -> np.ndarray:
        return blocks[..., at : at + 32].copy().view("<f2").astype(np.float32)[..., None]

    begin = 32 if type == "Q6_K" else 64
    small = blocks[..., begin : begin + 256].reshape(tiles, count, 8, 2, 16, 1)
    parts = blocks[..., begin + 256 :].reshape(tiles, count, 8, -1, 16, 4).swapaxes(3, 4)  # group after row
    q = parts[..., :4, :].reshape(tiles, count, 8, 16, 16)
    q = np.concatenate([q & 15, q >> 4], axis=-1)
    for column in range(32):
        group, byte = column // 4, column % 4
        if type == "Q5_K":
            q[..., column] |= (parts[..., 4, byte] >> group & 1) << 4
        if type == "Q6_K":
            q[..., column] |= (parts[..., 4 + group // 4, byte] >> 2 * (group % 4) & 3) << 4
    if type == "Q6_K":
        each = np.repeat(small.view(np.int8).swapaxes(3, 4)[..., 0], 16, axis=-1)  # columns 0..15, 16..31
        values = scale(0)[:, :, None] * each * (q.astype(np.float32) - 32)
    else:
        values = scale(0)[:, :, None] * small[:, :, :, 0] * q - scale(32)[:, :, None] * small[:, :, :, 1]
    return values.transpose(0, 3, 1, 2, 4).reshape(tiles, 16, -1)


def test_a_packing_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = tmp_path / "a", tmp_path / "b"
    packed("llama3", first)
    pack_page = Writer._page

    def broken(self: Writer, page: PackedPage) -> PackedPiece:
        if page.kind == HEAD:
            raise KeyboardInterrupt
        return pack_page(self, page)

    monkeypatch.setattr(Writer, "_page", broken)
    with pytest.raises(KeyboardInterrupt):
        packed("llama3", again)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="is not packed completely; run the same pack command again"):
        open_source(again)
    spoiled = again / "layer-00000.safetensors"
    data = bytearray(spoiled.read_bytes())
    data[-5000] ^= 1
    spoiled.write_bytes(data)
    before = {path.name: path.stat().st_mtime_ns for path in again.glob("layer*")}
    made = packed("llama3", again)
    assert made.kept == len(before) - 1
    assert spoiled.stat().st_mtime_ns != before[spoiled.name]
    assert content(first) == content(again)
    assert packed("llama3", again).kept == made.files


def test_every_byte_is_read_once_hashed_once_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in small requests, though a matrix goes to eight panels. And what does not come back from the disk as it was
    written never gets its file's name."""
    read, compared = [], []
    plain, write = DirectFile.read, VerifiedFile.write

    def counted(self: DirectFile, offset: int, nbytes: int) -> np.ndarray:
        read.append(nbytes)
        return plain(self, offset, nbytes)

    def noted(self: VerifiedFile, data: np.ndarray, at: int) -> None:
        compared.append(len(data))
        write(self, data, at)

    monkeypatch.setattr(DirectFile, "read", counted)
    monkeypatch.setattr(VerifiedFile, "write", noted)
    made = packed("llama3", tmp_path / "p")
    with closing(open_source(model_path("llama3"))) as source:
        matrices = [info.nbytes for key, info in source.tensors.items() if len(info.shape) == 2]
    assert sorted(read) == sorted(matrices)  # each is less than a request
    assert sum(compared) == made.bytes

    def forgotten(*arguments: Any) -> bool:
        arguments[-1][:] = 0
        return True

    for name in ("read_direct", "read_at"):
        monkeypatch.setattr(verified, name, forgotten)
    with pytest.raises(ModelError, match=r"does not hold what was written to it; pack to another disk"):
        packed("llama3", tmp_path / "q")
    assert not list((tmp_path / "q").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "weights"), [("llama3", "q8_0"), ("llama_mixed.gguf", "source"), ("mixtral", "q4_0")]
)
def test_requests_of_any_size_pack_the_same(
    name: str, weights: PackedType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is larger than it may be, unless a tile of rows is (a head in llama.cpp's order, pages of embeddings)."""
    packed(name, tmp_path / "p", weights)
    plain = DirectFile.read
    maximum = int(np.random.default_rng().integers(1, 20)) * 1000
    requests = []

    def counted(self: DirectFile, offset: int, nbytes: int) -> np.ndarray:
        requests.append(nbytes)
        return plain(self, offset, nbytes)

    monkeypatch.setattr(DirectFile, "read", counted)
    monkeypatch.setattr(packed_files, "PORTION", maximum)
    packed(name, tmp_path / "q", weights)
    with closing(open_unpacked(model_path(name))) as source:
        matrices = [key for key, info in source.tensors.items() if len(info.shape) == 2]
        tile = max(max(16, source.head_rows(key)) * source.working_row_bytes(key) for key in matrices)
        pages = math.lcm(4096, source.working_row_bytes(Key("embed")))
    assert max(requests) <= max(maximum, tile, pages)
    assert content(tmp_path / "p") == content(tmp_path / "q")


def test_ranks_pack_together_and_page_together(openmpi: Mpi, tmp_path: Path) -> None:
    """Two ranks pack what one packs; 2 and 4 ranks in stages and shards compute what one computes."""
    packed("llama3", tmp_path / "a")
    done = openmpi.run(2, "-m", "mpillm", "pack", model_path("llama3"), tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "is packed" in done.stderr
    assert content(tmp_path / "a") == content(tmp_path / "b")
    program = Path(__file__).with_name("packed_ranks.py")
    packed("qwen3_moe", tmp_path / "c")
    for ranks, folder, name in ((2, "b", "llama3"), (4, "c", "qwen3_moe")):
        done = openmpi.run(ranks, program, tmp_path / folder, name, expected(name))
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are there")
def test_what_a_run_mapped_stays_in_the_page_cache(tmp_path: Path) -> None:
    """The next start finds it there: only parts that make room for others leave it."""
    packed("llama3", tmp_path / "p")
    outcome(tmp_path / "p", "llama3", loader="mmap")
    for file in (tmp_path / "p").glob("layer-*.safetensors"):
        assert resident(np.memmap(file, mode="r")) == 1.0


def test_the_loader_suits_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed("llama3", tmp_path / "p")
    assert network_kind(tmp_path) is None
    with closing(open_source(tmp_path / "p")) as source:
        config = config_of(source)
        items = rank_plans(config, Place(0, 1, 1), source)

        def chosen(kind: Kind, streamed: bool) -> type:
            with closing(source.open_loader(kind, 1, items, streamed)) as loader:
                return type(loader)

        assert chosen("auto", streamed=True) is chosen("read", streamed=False) is ReadLoader
        assert chosen("auto", streamed=False) is chosen("mmap", streamed=True) is MappedLoader
        monkeypatch.setattr(loaders, "network_kind", lambda _: "nfs")
        assert chosen("auto", streamed=False) is ReadLoader
        monkeypatch.setattr(loaders, "can_populate", lambda: False)
        with pytest.raises(JobError, match=r'memory\.loader = "mmap" needs Linux 5\.14 or newer'):
            chosen("mmap", streamed=False)
