"""What tests of packed models share."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from mpillm.tools.pack import PackedType, PackResult, pack
from tests.model.checks import digest, requests_of, sampled
from tests.model.engine_harness import _alone, run_engine
from tests.model.golden import FIXTURES, golden


class Quiet:
    """Progress that nobody sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def packing(self, done: int, total: int) -> None:
        self.seen.append((done, total))

    def downloading(self, done: int, total: int) -> None:
        pass


def packed(name: str | Path, target: Path, weights: PackedType = "source") -> PackResult:
    return pack(_alone(), str(model_path(name) if isinstance(name, str) else name), target, weights, Quiet())


def model_path(name: str) -> Path:
    return FIXTURES / ("gguf" if name.endswith(".gguf") else "models") / name


def outcome(model: Path, name: str, **job: object) -> str:
    reference = golden(name)
    requests = [*requests_of(reference)[-3:], *sampled(reference)[:2]]
    return digest(run_engine(model, requests, activations="f32", kv_type="f32", threads=1, **job))


@functools.cache
def expected(name: str, quantize: str = "none") -> str:
    return outcome(model_path(name), name, quantize=quantize)


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
