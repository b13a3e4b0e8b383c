"""The synthetic models: their sizes, and the name, shape and type of each of their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from mpillm.bench.published import PUBLISHED, Published
from mpillm.errors import JobError


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


# The type of rows that are no whole blocks.
INSTEAD = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
    Type.IQ4_XS: Type.IQ4_NL,
    **dict.fromkeys((Type.IQ3_S, Type.IQ3_XXS, Type.IQ2_S, Type.IQ2_XS, Type.IQ2_XXS), Type.Q4_0),
}


def shape_named(shape: str, weights: str) -> Shape | Published:
    """Return the shape of that name; NAME:N has the first N layers alone. JobError if there is no such model."""
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


def tensors(shape: Shape | Published, recipe: str) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Name, shape and type of every tensor, in the order of llama.cpp's files."""
    wanted = _published if isinstance(shape, Published) else _wanted
    for name, sizes, kind in wanted(shape, recipe):  # type: ignore[arg-type]
        yield name, sizes, INSTEAD[kind] if sizes[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _published(shape: Published, recipe: str) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Return the type like `_wanted`; with MXFP4 only experts have that type, and other matrices have Q8_0."""
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
    """Return bytes of a tensor in the file."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * block_bytes
