"""Models of well-known shapes with random weights, as GGUF files. Speed depends only on the shape, so no real model
need be downloaded.

Weights are valid blocks whose scales keep activations finite: uniform integers times scales that make a row's standard
deviation about 1 / sqrt(k). A few random megabytes per block type are repeated, each tensor beginning elsewhere in
them, so that writing is as fast as the disk. Tensors have the types that llama.cpp's quantiser gives them
(llama_tensor_get_type in src/llama-quant.cpp); there is no tokenizer, so requests are token ids.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from mpillm.bench.published import Published
from mpillm.bench.random_blocks import DECAYS, random_blocks
from mpillm.bench.synthetic_shapes import Shape, nbytes, shape_named, tensors
from mpillm.catalogue.models import models_dir
from mpillm.errors import JobError
from mpillm.spec import shown_bytes

ALIGNMENT = 32  # the alignment of tensors in a GGUF file
MAX_POSITION = 32_768
VECTORS = 100  # the `k` of vectors that are no norms (`_spread`)


def create(shape: str, weights: str) -> Path:
    """Return the file of a shape with weights of a type, writing it to `folder()` first if it is not there yet."""
    found = shape_named(shape, weights)
    path = folder() / f"{shape}.{weights}.gguf"
    with said(path):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, shape, found, weights)
    return path


@contextlib.contextmanager
def said(path: Path) -> Iterator[None]:
    """Turn an error of the system while a model is written into a JobError."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"The synthetic model {path} cannot be written ({error.strerror or error}); set MPILLM_CACHE."
        ) from error


def folder() -> Path:
    """Return the directory of synthetic models. It has nothing else in it and may be deleted."""
    return models_dir().parent / "synthetic"


def write(path: Path, name: str, shape: Shape | Published, weights: str) -> None:
    """Write the GGUF file of a model of that name and shape."""
    listed = list(tensors(shape, weights))
    require_room(path, sum(nbytes(kind, sizes) + ALIGNMENT for _, sizes, kind in listed) + 2**20)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_header(part, name, shape, listed)
        with part.open("ab", buffering=0) as file:
            file.write(bytes(-file.tell() % ALIGNMENT))
            pools: dict[tuple[Type, int], bytes] = {}
            for tensor, sizes, kind in listed:
                key = (kind, _spread(tensor, sizes))
                if key not in pools:
                    pools[key] = random_blocks(*key).tobytes()
                length = nbytes(kind, sizes)
                _repeat(
                    file.write,
                    pools[key],
                    gguf.GGML_QUANT_SIZES[kind][1],
                    zlib.crc32(tensor.encode()),
                    length,
                )
                file.write(bytes(-length % ALIGNMENT))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _spread(tensor: str, sizes: tuple[int, ...]) -> int:
    """Return the `k` of `random_blocks` for a tensor: its columns, 0 of a norm, for other vectors a value near 0."""
    if tensor.endswith("ssm_a"):
        return DECAYS
    if len(sizes) == 1 or tensor.endswith(".bias"):
        return 0 if "norm" in tensor else VECTORS
    return sizes[-1]


def require_room(path: Path, needed: int) -> None:
    """Raise JobError if the disk has fewer bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise JobError(
            f"The synthetic model {path} takes {shown_bytes(needed)}, but {shown_bytes(free)} are free; free "
            "some space, or set MPILLM_CACHE to a directory with more."
        )


def _write_header(
    part: Path, name: str, shape: Shape | Published, listed: list[tuple[str, tuple[int, ...], Type]]
) -> None:
    writer = gguf.GGUFWriter(part, shape.architecture)
    writer.add_name(f"random {name}")
    writer.add_vocab_size(shape.vocab)
    (_add_published if isinstance(shape, Published) else _add_usual)(writer, shape)  # type: ignore[arg-type]
    writer.add_tokenizer_model("no_vocab")
    for tensor, sizes, kind in listed:
        writer.add_tensor_info(tensor, sizes, np.dtype(np.float32), nbytes(kind, sizes), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_published(writer: gguf.GGUFWriter, shape: Published) -> None:
    add: Mapping[type, Callable[[str, Any], None]] = {
        str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool,
        list: writer.add_array,
    }  # fmt: skip
    for name, value in shape.metadata():
        add[type(value)](f"{shape.architecture}.{name}", value)


def _add_usual(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(MAX_POSITION)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(shape.ffn * max(1, shape.experts_used))
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.ffn)


def _repeat(
    write: Callable[[memoryview], int], pool: bytes, block_bytes: int, seed: int, length: int
) -> None:
    """Write `length` bytes of the pool, over and over, from a block that `seed` picks."""
    at, data = seed % (len(pool) // block_bytes) * block_bytes, memoryview(pool)
    while length:
        done = write(data[at : at + min(length, len(pool) - at)])
        at, length = (at + done) % len(pool), length - done
