"""Adapters in GGUF files, as llama.cpp's convert_lora_to_gguf.py writes them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpillm.errors import ModelError
from mpillm.weights.formats.adapter import AdapterFiles, Factors, pairs_of
from mpillm.weights.formats.extent import Extent
from mpillm.weights.formats.gguf_family import GgufFamily
from mpillm.weights.formats.gguf_header import read_header
from mpillm.weights.formats.heads import row_groups
from mpillm.weights.io.mapped import MappedFile

_FACTOR = re.compile(r"(?P<tensor>.+)\.lora_(?P<factor>[ab])")


def open_gguf_adapter(path: Path, family: GgufFamily, config: dict[str, Any]) -> AdapterFiles:
    """Return the adapter in a file, for a model of `family` with this configuration; ModelError if it is none."""
    file = MappedFile(path)
    try:
        metadata, tensors = read_header(file)
        alpha = _alpha(path, metadata, family)
        found: dict[str, dict[str, Extent]] = {}
        for name, tensor in tensors.items():
            match = _FACTOR.fullmatch(name)
            if match is None:
                raise ModelError(
                    f"{path}: tensor {name[:80]!r}is not a factor of a matrix (.lora_a, .lora_b)."
                )
            extent = Extent(file, name, tensor.offset, tensor.shape, tensor.stored)
            found.setdefault(match["tensor"], {})[match["factor"].upper()] = extent
        factors = []
        for name, (a, b) in pairs_of(file, found).items():
            parsed = family.names.parse_gguf(name)
            if parsed is None:
                raise ModelError(
                    f"{path} adapts {name[:80]!r}, which the model does not have; the adapter was made for another one."
                )
            if family.names.rope_pairs and parsed.roles in {("q",), ("k",)}:
                key = "num_attention_heads" if parsed.roles == ("q",) else "num_key_value_heads"
                heads = config.get(key) or config["num_attention_heads"]
                if b.shape[0] % (2 * heads):
                    raise ModelError(
                        f"{path}: tensor {b.name} has {b.shape[0]} rows, not {heads} even heads."
                    )
                b = replace(b, rope_heads=heads)
            scale = alpha / a.shape[0] if alpha else 1.0
            factors.append(Factors(name, parsed, a, b, scale, row_groups(config, family)))
        return AdapterFiles(path, (path,), file, factors)
    except BaseException:
        file.close()
        raise


def _alpha(path: Path, metadata: dict[str, Any], family: GgufFamily) -> float:
    """Return the factor of the products, times their rank; ModelError if this is no adapter for the family."""
    if metadata.get("general.type") != "adapter" or metadata.get("adapter.type") != "lora":
        raise ModelError(f"{path} is not a LoRA adapter: its general.type and adapter.type do not say so.")
    if (kind := metadata.get("general.architecture")) not in (*family.gguf, *family.gguf_adapters):
        raise ModelError(
            f"{path} was made for a model of architecture {str(kind)[:60]!r}, which this one is not."
        )
    if metadata.get("adapter.alora.invocation_tokens"):
        raise ModelError(f"{path} begins at invocation tokens (aLoRA), which is not supported.")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) is not float:
        raise ModelError(f"{path}: adapter.lora.alpha is {str(alpha)[:40]}, but must be a number.")
    return alpha
