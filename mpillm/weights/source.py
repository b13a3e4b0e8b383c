"""Where weights come from: one small protocol, and what opens each kind of model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpillm.errors import ModelError
from mpillm.kernels.types import QUANT_BLOCK
from mpillm.partition.grid import Place, Shape
from mpillm.weights.formats.gguf_file import open_gguf
from mpillm.weights.formats.hf import open_hf
from mpillm.weights.formats.tensors import TensorInfo, TensorSource
from mpillm.weights.layer import LayerPlan, Tensors
from mpillm.weights.names import ROLES, Key
from mpillm.weights.packed.layout import INDEX, UNFINISHED
from mpillm.weights.packed.source import PackedSource, open_packed

__all__ = ["Source", "TensorInfo", "column_unit", "fingerprint", "open_source"]

SAMPLES = 64  # of a file, evenly spread
SAMPLE_BYTES = 4096
ENDS_BYTES = 64 * 1024  # of a file's beginning and its end


class Source(Protocol):
    """A model's weights and configuration; see `TensorSource` and `PackedSource` for what each method returns."""

    path: Path
    files: tuple[Path, ...]  # whose samples say whether two ranks see the same model
    config: dict[str, Any]  # with the keys of Hugging Face's config.json
    tensors: Mapping[Key, TensorInfo]
    # The directory with tokenizer.json (if any), or a GGUF file's tokenizer.* fields.
    tokenizer: Path | dict[str, Any]

    def plan(self, part: str, layer: int, tensors: Tensors, shape: Shape, place: Place) -> LayerPlan:
        """What a rank holds of the tensors that are paged in together as a part of a layer."""

    def plan_experts(self, layer: int, shape: Shape, place: Place) -> list[LayerPlan]:
        """What a rank holds of each expert of a layer."""

    def read_f32(self, key: Key, rows: range | NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
        """Rows of the embedding table, as float32."""

    def close(self) -> None:
        """Let go of the files."""


def open_source(path: str | Path, quantize: str = "none") -> TensorSource | PackedSource:
    """Open a Hugging Face directory, a GGUF file, a directory that holds one, or a packed directory.

    `quantize` ("q8_0", "q4_0") quantises the matrices of layers and the output head while they are read: for models
    that are not quantised yet, JobError otherwise. Norms, biases, routers and embedding rows stay as they are.
    ModelError says what is wrong with the files.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, False where a directory on the way is forbidden
        raise ModelError(
            f"{path} does not exist or is out of reach; give a Hugging Face directory or a GGUF file."
        )
    if not os.path.isdir(path):
        return open_gguf(path, quantize)
    if os.path.exists(path / INDEX):
        return open_packed(path, quantize)
    if os.path.exists(path / UNFINISHED):
        raise ModelError(f"{path} is not packed completely; run the same pack command again to finish it.")
    if not os.path.exists(path / "config.json"):
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 or (ggufs and ggufs[0].name.endswith(f"-00001-of-{len(ggufs):05d}.gguf")):
            return open_gguf(ggufs[0], quantize)
        if ggufs:
            raise ModelError(f"{path} holds {len(ggufs)} GGUF files; give one of them as the model.")
    return open_hf(path, quantize)


def column_unit(source: Source) -> int:
    """The granularity of column cuts (`grid.Shape.unit`).

    256 if a matrix that is cut by columns is delivered as K-quants, 32 if any other one is quantised (activations are,
    32 at a time), else 1.
    """
    unit = 1
    for key, info in source.tensors.items():
        if ROLES[key.role].quantisable and info.type.quantised:
            unit = max(unit, info.type.block if ROLES[key.role].cut_by_columns else QUANT_BLOCK)
    return unit


def fingerprint(source: Source) -> tuple[int, str]:
    """The size of the source's files in bytes and a hash of samples of them: equal on all ranks that see one model."""
    digest = hashlib.blake2b(digest_size=16)
    total = 0
    for path in source.files:
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name}\0{size}\0".encode())
                for offset, count in _samples(size):
                    digest.update(os.pread(file.fileno(), count, offset))
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
        total += size
    return total, digest.hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    """Offsets and lengths: all of a small file, else both ends and samples between them."""
    if size <= 2 * ENDS_BYTES + SAMPLES * SAMPLE_BYTES:
        return [(0, size)]
    between = [(i * (size - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES) for i in range(SAMPLES)]
    return [(0, ENDS_BYTES), *between, (size - ENDS_BYTES, ENDS_BYTES)]
