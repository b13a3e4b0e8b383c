"""Opening a model: which kind of source a path is."""

from __future__ import annotations

import os
from pathlib import Path

from mpillm.errors import JobError, ModelError
from mpillm.weights.formats.families import Families
from mpillm.weights.formats.gguf_parts import is_later_part
from mpillm.weights.formats.hf import INDEX as SAFETENSORS_INDEX
from mpillm.weights.formats.hf import SINGLE, open_hf
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.packed.layout import INDEX, UNFINISHED
from mpillm.weights.packed.source import open_packed
from mpillm.weights.source import Source

CONFIG = "config.json"
BESIDE = ("mmproj", "imatrix")  # parts of names of files that are beside models


def open_source(path: str | Path, families: Families, quantize: str = "none") -> Source:
    """Open a Hugging Face directory, a GGUF or `.m` file, a directory that holds one, or a packed directory.

    `quantize` ("q8_0", "q4_0", "w8a8") quantises the matrices of layers and the output head while they are read;
    JobError if they are packed. Norms, biases, routers and embedding rows stay as they are.
    ModelError says what is wrong with the files.
    """
    path = Path(path)
    return open_packed(path, quantize) if _is_packed(path) else open_unpacked(path, families, quantize)


def open_unpacked(path: str | Path, families: Families, quantize: str = "none") -> TensorSource:
    """Open a model that is not packed, whose tensors can be read one by one; JobError if it is packed.

    `quantize` may also be "bf16" or "f32" here: what packing can make.
    """
    path = Path(path)
    if _is_packed(path):
        raise JobError(f"{path} is packed already; pack the model that it was made from.")
    if not os.path.exists(path):  # unlike Path.exists, False where a directory on the way is forbidden
        raise ModelError(
            f"{path} does not exist or cannot be accessed; give a Hugging Face directory or a GGUF file."
        )
    if not os.path.isdir(path):
        return _open_file(path, families, quantize)
    if os.path.exists(path / UNFINISHED):
        raise ModelError(f"{path} is not packed completely; run the same pack command again to finish it.")
    if found := file_in(path):
        return _open_file(found, families, quantize)
    return open_hf(path, families, quantize)


def _is_packed(path: Path) -> bool:
    return os.path.isdir(path) and os.path.exists(path / INDEX)


def _open_file(path: Path, families: Families, quantize: str) -> TensorSource:
    from mpillm.weights.formats.dllama_file import is_dllama, open_dllama

    if is_dllama(path):
        return open_dllama(path, families, quantize)
    from mpillm.weights.formats.gguf_file import open_gguf

    return open_gguf(path, families, quantize)


def file_in(path: Path) -> Path | None:
    """Return the GGUF file, the first part of one, or Distributed-Llama's file (.m) that is the model in a directory.

    None if it has safetensors files, or no such file. ModelError if there are several models, or only in its folders.
    """
    if any((path / name).exists() for name in (SINGLE, SAFETENSORS_INDEX)):
        return None
    found = _gguf_files(path, "*")
    models = [file for file in found if not is_later_part(file.name)]
    if not found:
        models = sorted(path.glob("*.m"))
    if len(models) > 1:
        kind = "GGUF files" if found else "models (.m)"
        raise ModelError(f"{path} holds {len(models)} {kind}; give the path of one, such as {models[0]}.")
    if not models and not found and not (path / CONFIG).exists() and (below := _gguf_files(path, "*/*")):
        raise ModelError(f"{path} has no model, but its folders have; give one, such as {below[0]}.")
    if found and not models:
        raise ModelError(f"{path} has {found[0].name}, but not the first part of it; fetch the other parts.")
    return models[0] if models else None


def _gguf_files(path: Path, pattern: str) -> list[Path]:
    """GGUF files that may be models: not what turns images into embeddings, nor statistics of a quantisation."""
    found = (file for file in path.glob(pattern) if file.suffix.lower() == ".gguf")
    return sorted(file for file in found if not is_beside(file.name))


def is_beside(name: str) -> bool:
    """Return whether a file of this name lies beside models and is none."""
    return any(word in name.lower() for word in BESIDE)
