"""Packing, and packed models: the same bytes as the unpacked run, whatever loader, budget and policy."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import pytest

from mpillm.job import pack as packing
from mpillm.job.pack import Packed, pack
from mpillm.weights.source import open_source
from tests.model.checks import requests_of
from tests.model.engine_harness import _alone, run_engine
from tests.model.golden import FIXTURES, golden
from tests.mpi.models import digest, sampled

EVERY = [
    "llama3",
    "llama_bias",
    "mixtral",
    "qwen3_moe",
    "smol_bf16",
    "llama_mixed.gguf",
    "llama_kquants.gguf",
]


class Quiet:
    """Progress that nobody sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def packing(self, done: int, total: int) -> None:
        self.seen.append((done, total))

    def downloading(self, done: int, total: int) -> None:
        pass


def packed(name: str | Path, target: Path, weights: packing.Weights = "source") -> Packed:
    return pack(_alone(), str(model_path(name) if isinstance(name, str) else name), target, weights, Quiet())


def model_path(name: str) -> Path:
    return FIXTURES / ("gguf" if name.endswith(".gguf") else "models") / name


def outcome(model: Path, name: str, **job: object) -> str:
    reference = golden(name)
    requests = [*requests_of(reference), *sampled(reference)]
    return digest(run_engine(model, requests, activations="f32", kv_type="f32", **job))


@functools.cache
def expected(name: str, quantize: str = "none") -> str:
    return outcome(model_path(name), name, quantize=quantize)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("name", EVERY)
def test_packed_is_as_unpacked(tmp_path: Path, name: str) -> None:
    packed(name, tmp_path / "p")
    source = open_source(tmp_path / "p")
    source.close()
    assert outcome(tmp_path / "p", name) == expected(name)
    assert outcome(tmp_path / "p", name, loader="read") == expected(name)
