"""Opening a model: which kind of source a path is."""

from __future__ import annotations

import os
from pathlib import Path

from mpillm.errors import JobError, ModelError
from mpillm.weights.formats.families import Families
from mpillm.weights.formats.gguf_file import open_gguf
from mpillm.weights.formats.hf import open_hf
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.packed.layout import INDEX, UNFINISHED
from mpillm.weights.packed.source import open_packed
from mpillm.weights.source import Source


def open_source(path: str | Path, families: Families, quantize: str = "none") -> Source:
    """Open a Hugging Face directory, a GGUF file, a directory that holds one, or a packed directory.

    `quantize` ("q8_0", "q4_0") quantises the matrices of layers and the output head while they are read: for models
    that are not quantised yet, JobError otherwise. Norms, biases, routers and embedding rows stay as they are.
    ModelError says what is wrong with the files.
    """
    path = Path(path)
    return open_packed(path, quantize) if _is_packed(path) else open_unpacked(path, families, quantize)


def open_unpacked(path: str | Path, families: Families, quantize: str = "none") -> TensorSource:
    """The same for a model that is not packed, whose tensors can be read one by one; JobError if it is packed.

    `quantize` may also be "bf16" or "f32" here: what packing can make.
    """
    path = Path(path)
    if _is_packed(path):
        raise JobError(f"{path} is packed already; pack the model that it was made from.")
    if not os.path.exists(path):  # unlike Path.exists, False where a directory on the way is forbidden
        raise ModelError(
            f"{path} does not exist or is out of reach; give a Hugging Face directory or a GGUF file."
        )
    if not os.path.isdir(path):
        return open_gguf(path, families, quantize)
    if os.path.exists(path / UNFINISHED):
        raise ModelError(f"{path} is not packed completely; run the same pack command again to finish it.")
    if not os.path.exists(path / "config.json"):
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 or (ggufs and ggufs[0].name.endswith(f"-00001-of-{len(ggufs):05d}.gguf")):
            return open_gguf(ggufs[0], families, quantize)
        if ggufs:
            raise ModelError(f"{path} holds {len(ggufs)} GGUF files; give one of them as the model.")
    return open_hf(path, families, quantize)


def _is_packed(path: Path) -> bool:
    return os.path.isdir(path) and os.path.exists(path / INDEX)
