"""What is rebuilt changes no answer: all fixtures, with any budget and in any form, against digests recorded once.

`tests/mpi/test_models.py` compares all layouts with the same digests.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpillm import kernels
from mpillm.kernels import KV_BLOCK
from mpillm.tools.pack import PackedType, pack
from mpillm.weights.paging.weights import minimum_budget
from tests.conftest import Mpi, run_bounded
from tests.e2e.jobs import command, mixed_lines, write_lines
from tests.model.engine_harness import _alone, run_laid_out, vocab_of
from tests.model.golden import GGUFS, MODELS, may_be_quantised, path_of
from tests.model.test_smollm2 import smollm2
from tests.tools.packing import Quiet

from .recorded import check, digest_of, requests

ALL = [*MODELS, *(f"{name}.gguf" for name in GGUFS)]
EXACT_PATHS = [name for name in kernels.available() if name not in ("numpy", "avx")]
WIDE = "llama_mixed.gguf"  # whose heads are whole blocks of Q8_0
TIGHT = 4  # blocks of the KV cache: the longest request needs three

pytestmark = pytest.mark.skipif(
    kernels.path() not in EXACT_PATHS, reason="NumPy and plain AVX (no FMA) do not promise the same bytes"
)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = kernels.path()
    yield
    kernels.set_path(before)


def answers(model: Path, **job: Any) -> str:
    completions, session = run_laid_out(_alone(), model, requests(vocab_of(model)), **job)
    if job.get("weights", "all") != "all":
        assert session.weights.streamed > 0
    return digest_of(completions)


@functools.cache
def budgets(model: Path) -> dict[str, int]:
    """The least that `model` can do with: every layer is paged in for each step, sequences are preempted."""
    _, session = run_laid_out(_alone(), model, [])
    blocks, states = TIGHT * KV_BLOCK * session.kv_token_nbytes, session.caches[0].state_nbytes
    return {
        "weights": minimum_budget(session.weights.pages),
        "kv": 2 * max(blocks, states) if states else blocks,  # states take half of it at most
    }


@pytest.mark.parametrize("name", ALL)
def test_each_model(name: str) -> None:
    model = path_of(name)
    found = answers(model)
    check({name: found})
    tight = {**budgets(model), "max_num_batched_tokens": 40, "speculation": "prompt-lookup"}
    assert answers(model, **tight, threads=1) == found
    other = "f32" if may_be_quantised(name) else "f16"
    check({f"{name} kv={other}": answers(model, kv_type=other, threads=2, max_num_seqs=3)})


def test_keys_and_values_in_q8_0() -> None:
    check({f"{WIDE} kv=q8_0": answers(path_of(WIDE), kv_type="q8_0")})


@pytest.mark.parametrize("quantize", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("mxfp4")])
def test_quantised_while_paged_in(name: str, quantize: str) -> None:
    check({f"{name} quantize={quantize}": answers(path_of(name), quantize=quantize)})


@pytest.mark.parametrize("path", EXACT_PATHS)
def test_each_kernel_path(path: str) -> None:
    """Every block type, dense layers and experts."""
    kernels.set_path(path)
    for name in ("llama3", "qwen3_moe", "deepseek_v3", "smol_bf16", *(f"{name}.gguf" for name in GGUFS)):
        check({name: answers(path_of(name))})
    test_keys_and_values_in_q8_0()
    for name in ("llama3", "qwen3_moe"):
        for quantize in ("q8_0", "q4_0"):
            check({f"{name} quantize={quantize}": answers(path_of(name), quantize=quantize)})


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        *(
            (name, "source")
            for name in (
                "llama_bias",
                "mixtral",
                "smol_bf16",
                "phi3",
                "granitemoe_shared",
                "deepseek_v2",
                "llama_kquants.gguf",
            )
        ),
        *(
            (name, weights)
            for name in ("llama3", "qwen3_moe", "deepseek_v3")
            for weights in ("source", "q4_0", "q8_0")
        ),
    ],
)
def test_packed(name: str, weights: PackedType, tmp_path: Path) -> None:
    pack(_alone(), str(path_of(name)), tmp_path / "packed", weights, Quiet())
    like = name if weights == "source" else f"{name} quantize={weights}"
    for loader in ("mmap", "read"):
        check({like: answers(tmp_path / "packed", **budgets(tmp_path / "packed"), loader=loader)})


@pytest.mark.mpiexec
def test_whole_jobs(openmpi: Mpi, tmp_path: Path) -> None:
    """Texts, chats, choices, errors, scores, embeddings: the lines of results.jsonl and the tables of results.h5."""
    lines = [*mixed_lines(24), {"custom_id": "bad", "method": "POST", "url": "/v1/nothing", "body": {}}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    alone = run_bounded([sys.executable, *command(source, tmp_path / "1")])
    ways = [(2, "layout.stages=2"), (2, "layout.shards=2"), (2, "layout.shards=2", "wire.activations=q8_0")]
    done = [openmpi.run(ranks, *command(source, tmp_path / str(i), *settings))
            for i, (ranks, *settings) in enumerate(ways, 2)]  # fmt: skip
    for run in (alone, *done):
        assert run.returncode == 1, run.stderr  # one line is bad
    for output, settings in zip("1234", ["", "", "", " wire=q8_0 shards=2"], strict=True):
        found = {"results.jsonl": answers_in, "results.h5": tables_of}
        check({f"job of chat{settings}: {name}": of(tmp_path / output / name) for name, of in found.items()})


def answers_in(path: Path) -> str:
    """All lines but those of errors, whose words may change."""
    good = [line for line in path.read_bytes().splitlines() if b'"error":null' in line]
    assert len(good) == 24
    return hashlib.blake2b(b"\n".join(good), digest_size=12).hexdigest()


def tables_of(path: Path) -> str:
    """All datasets of the file, but not how HDF5 lays them out, nor the attributes that name a version."""
    state = hashlib.blake2b(digest_size=12)
    with h5py.File(path) as h5:
        names: list[str] = []
        h5.visit(names.append)
        for name in sorted(names):
            if isinstance(h5[name], h5py.Dataset):
                values = h5[name][()]
                kind = "text" if values.dtype == object else values.dtype.str
                content = (
                    b"\0".join(values.tolist()) if values.dtype == object else np.asarray(values).tobytes()
                )
                state.update(f"\n{name} {kind} {values.shape}\n".encode() + content)
    return state.hexdigest()


@pytest.mark.slow
def test_smollm2() -> None:
    model = smollm2()
    check({"smollm2": answers(model)})
    check({"smollm2 kv=q8_0": answers(model, **budgets(model), kv_type="q8_0")})
