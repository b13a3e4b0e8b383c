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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from mpillm.bench.published import PUBLISHED, Published
from mpillm.bench.random_blocks import DECAYS, random_blocks
from mpillm.catalogue.models import models_dir
from mpillm.errors import JobError
from mpillm.spec import shown_bytes

ALIGNMENT = 32  # of tensors in a GGUF file
MAX_POSITION = 32_768
VECTORS = 100  # the `k` of vectors that are no norms (`_spread`)


@dataclass(frozen=True)
class Shape:
    """A model's sizes; `experts` > 0 means a mixture, whose experts have the width `ffn`."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int = 0
    experts_used: int = 0


SHAPES: dict[str, Shape] = {
    "llama-1b": Shape("llama", 2048, 16, 32, 8, 64, 8192, 32_000),
    "llama-8b": Shape("llama", 4096, 32, 32, 8, 128, 14_336, 128_256),
    "llama-70b": Shape("llama", 8192, 80, 64, 8, 128, 28_672, 128_256),
    "qwen3-30b-a3b": Shape("qwen3moe", 2048, 48, 32, 4, 128, 768, 151_936, 128, 8),
    # For tests and for trying the command out.
    "tiny-llama": Shape("llama", 256, 2, 4, 2, 64, 512, 1024),
    "tiny-moe": Shape("qwen3moe", 256, 2, 4, 2, 64, 64, 1024, 8, 2),
}
WEIGHTS = {
    name.lower(): Type[name]
    for name in (
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ2_XXS",
        "IQ2_XS",
        "IQ2_S",
        "IQ3_XXS",
        "IQ3_S",
        "IQ4_NL",
        "IQ4_XS",
        "MXFP4",
        "BF16",
        "F16",
        "F32",
    )
}
# llama.cpp's usual mixtures: these types, and Q6_K where `_more_bits` says.
MIXTURES = {"q4_k_m": Type.Q4_K, "q5_k_m": Type.Q5_K}
INSTEAD = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.IQ4_XS: Type.IQ4_NL,
    **dict.fromkeys((Type.IQ3_S, Type.IQ3_XXS, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS), Type.Q4_0),
}  # of rows that are no whole blocks


def create(shape: str, weights: str) -> Path:
    """Return the file of a shape with weights of a type, writing it to `folder()` first if it is not there yet."""
    found = check(shape, weights)
    path = folder() / f"{shape}.{weights}.gguf"
    with said(path):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, shape, found, weights)
    return path


def check(shape: str, weights: str) -> Shape | Published:
    """The shape of that name, of which NAME:N has the first N layers alone; JobError if there is no such model."""
    name, _, first = shape.partition(":")
    found = SHAPES.get(name) or PUBLISHED.get(name)
    layers = found.layers if found else 0
    if found and first:
        layers = int(first) if first.isdecimal() and 0 < int(first) <= layers else 0
        found = replace(found, layers=layers) if isinstance(found, Shape) else found.of_layers(layers)
    if found is None or layers < 1 or weights not in WEIGHTS | MIXTURES:
        raise JobError(
            f"There is no synthetic model {shape} with {weights} weights; shapes are {', '.join(SHAPES | PUBLISHED)} "
            f"(NAME:N for the first N layers), weights {', '.join(WEIGHTS | MIXTURES)}."
        )
    return found


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
    """The directory of synthetic models. It has nothing else in it and may be deleted."""
    return models_dir().parent / "synthetic"


def tensors(shape: Shape | Published, recipe: str) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Name, shape and type of every tensor, in the order of llama.cpp's files."""
    wanted = _published if isinstance(shape, Published) else _wanted
    for name, sizes, kind in wanted(shape, recipe):  # type: ignore[arg-type]
        yield name, sizes, INSTEAD[kind] if sizes[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _published(shape: Published, recipe: str) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """As `_wanted`; with MXFP4 only experts have it, and other matrices Q8_0."""
    weights, layers = (WEIGHTS | MIXTURES)[recipe], shape.layers
    for name, sizes, matrix in shape.tensors():
        kind = weights if matrix else Type.F32
        if kind is Type.MXFP4 and "_exps." not in name:
            kind = Type.Q8_0
        elif name == "output.weight":
            kind = _of_head(weights)
        elif matrix and recipe in MIXTURES and ("attn_v." in name or "ffn_down" in name):
            kind = Type.Q6_K if _more_bits(int(name.split(".")[1]), layers) else weights
        yield name, sizes, kind


def _of_head(weights: Type) -> Type:
    return weights if weights in {Type.Q8_0, Type.F16, Type.BF16, Type.F32} else Type.Q6_K


def _wanted(shape: Shape, recipe: str) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    d, hd = shape.hidden, shape.head_dim
    weights = (WEIGHTS | MIXTURES)[recipe]
    yield "token_embd.weight", (shape.vocab, d), weights
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        more = Type.Q6_K if recipe in MIXTURES and _more_bits(layer, shape.layers) else weights
        yield f"{block}attn_norm.weight", (d,), Type.F32
        yield f"{block}attn_q.weight", (shape.heads * hd, d), weights
        yield f"{block}attn_k.weight", (shape.kv_heads * hd, d), weights
        yield f"{block}attn_v.weight", (shape.kv_heads * hd, d), more
        yield f"{block}attn_output.weight", (d, shape.heads * hd), weights
        if shape.architecture.startswith("qwen3"):
            yield f"{block}attn_q_norm.weight", (hd,), Type.F32
            yield f"{block}attn_k_norm.weight", (hd,), Type.F32
        yield f"{block}ffn_norm.weight", (d,), Type.F32
        if shape.experts:
            yield f"{block}ffn_gate_inp.weight", (shape.experts, d), Type.F32
        stack, name = ((shape.experts,), "_exps") if shape.experts else ((), "")
        yield f"{block}ffn_gate{name}.weight", (*stack, shape.ffn, d), weights
        yield f"{block}ffn_up{name}.weight", (*stack, shape.ffn, d), weights
        yield f"{block}ffn_down{name}.weight", (*stack, d, shape.ffn), more
    yield "output_norm.weight", (d,), Type.F32
    yield "output.weight", (shape.vocab, d), _of_head(weights)


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and the last eighth of the layers, and every third one between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def nbytes(kind: Type, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in the file."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * block_bytes


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
    """The `k` of `random_blocks` for a tensor: its columns, 0 of a norm, and of other vectors what makes them small."""
    if tensor.endswith("ssm_a"):
        return DECAYS
    if len(sizes) == 1 or tensor.endswith(".bias"):
        return 0 if "norm" in tensor else VECTORS
    return sizes[-1]


def require_room(path: Path, needed: int) -> None:
    """JobError if the disk has fewer bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise JobError(
            f"The synthetic model {path} takes {shown_bytes(needed)}, but {shown_bytes(free)} are free; make room, or "
            "set MPILLM_CACHE to a directory with more."
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
