"""GGUF files, single or split, as sources."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import ModelError
from mpillm.weights import names
from mpillm.weights.formats.extent import Extent
from mpillm.weights.formats.families import Families
from mpillm.weights.formats.gguf_family import config_of
from mpillm.weights.formats.gguf_float4 import extent_of, in_heads, scales_of
from mpillm.weights.formats.gguf_header import GgufHeader, GgufTensor, read_header
from mpillm.weights.formats.gguf_parts import MAX_PARTS, PART
from mpillm.weights.formats.heads import row_groups, split_kv_b
from mpillm.weights.formats.matrices import add
from mpillm.weights.formats.tensors import TensorSource
from mpillm.weights.io.mapped import MappedFile
from mpillm.weights.names import Parsed, RowGroups
from mpillm.weights.roles import Key

_LAYER = re.compile(r"blk\.(?P<layer>[0-9]{1,6})\.")


def open_gguf(path: Path, families: Families, quantize: str, whole: bool = True) -> TensorSource:
    """Return the model in a GGUF file (any part of a split one); ModelError if it is not complete or not sound.

    Without `whole` its header is enough, for what needs no weights.
    """
    files: list[MappedFile] = []
    try:
        headers = _read_parts(path, files, whole)
        metadata = headers[0].metadata
        family = families.of_gguf(metadata.get("general.architecture"), str(path))
        extents: dict[Key, Extent] = {}
        composed: list[
            tuple[Parsed, Extent]
        ] = []  # tensors that only the configuration tells how to take apart
        own = family.gguf_names({name for header in headers for name in header.tensors})
        scales = scales_of(zip(files, headers, strict=True))
        factors: dict[str, list[float]] = {}  # divisors of rotary frequencies by tensor
        for file, header in zip(files, headers, strict=True):
            for name, tensor in header.tensors.items():
                if names.holds_rope_factors(name):
                    factors[name] = _factors(file, name, tensor)
                ignored = name in scales or names.ignored_gguf(name)
                if not ignored and not _predicts_further(name, metadata):
                    parsed = _parse(file, name, own)
                    extent = extent_of(file, name, tensor, scales)
                    if len(parsed.roles) == 1:
                        add(extents, parsed, extent, {})
                    else:
                        composed.append((parsed, extent))
        shapes = {
            Key(role, parsed.layer): extent.shape for parsed, extent in composed for role in parsed.roles
        }
        shapes |= {key: extent.shape for key, extent in extents.items()}
        config = config_of(metadata, path, family, shapes.get, factors)
        groups = row_groups(config, family)
        for parsed, extent in composed:
            _check_qkv(parsed, extent, groups)
            add(extents, parsed, extent, groups)
        split_kv_b(extents, config, path)
        if family.names.rope_pairs:
            _mark_permuted(extents, config, path)
        # A file without output.weight has tied weights.
        extents.setdefault(Key("head"), extents[Key("embed")])
        tokenizer = {name: value for name, value in metadata.items() if name.startswith("tokenizer.")}
        return TensorSource(path, files, (), extents, config, tokenizer, quantize)
    except BaseException:
        for file in files:
            file.close()
        raise


def _read_parts(path: Path, files: list[MappedFile], whole: bool) -> list[GgufHeader]:
    """Return the headers of all parts, the one with the metadata first; `files` takes the mapped files."""
    match = PART.fullmatch(path.name)
    first = path if match is None else path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")
    if match is not None and os.path.exists(path) and not os.path.exists(first):
        raise ModelError(
            f"{path} is one of {int(match['count'])} parts, of which {first.name} is missing; fetch it."
        )
    files.append(MappedFile(first))
    headers = [read_header(files[0], whole)]
    count = headers[0].metadata.get("split.count", 0)
    if type(count) is not int or not 0 <= count <= MAX_PARTS:
        raise ModelError(f"{first}: split.count is {str(count)[:40]}, but must be at most {MAX_PARTS}.")
    if count <= 1:
        return headers
    if match is None or int(match["count"]) != count:
        raise ModelError(
            f"{first} is one of {count} parts, but its name does not end in -00001-of-{count:05d}.gguf; rename the "
            "parts so, or merge them with llama.cpp's gguf-split."
        )
    for number in range(2, count + 1):
        part = path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        if not os.path.exists(part):
            raise ModelError(f"{first} is one of {count} parts, of which {part.name} is missing; fetch it.")
        files.append(MappedFile(part))
        headers.append(read_header(files[-1], whole))
        if headers[-1].metadata.get("split.no") != number - 1:
            raise ModelError(
                f"{part} is not part {number} of {count} of the model in {first}; fetch it again."
            )
    return headers


def _predicts_further(name: str, metadata: dict[str, Any]) -> bool:
    """Return whether a tensor is of a layer behind the model's own, which predicts further tokens."""
    kind, found = metadata["general.architecture"], _LAYER.match(name)
    count, further = metadata.get(f"{kind}.block_count"), metadata.get(f"{kind}.nextn_predict_layers")
    if found is None or type(count) is not int or type(further) is not int:
        return False
    return count - further <= int(found["layer"]) < count


def _parse(file: MappedFile, name: str, own: names.Names) -> Parsed:
    parsed = own.parse_gguf(name)
    if parsed is None:
        raise ModelError(f"{file.path}: tensor {name[:80]!r} belongs to no architecture that is supported.")
    return parsed


def _check_qkv(parsed: Parsed, extent: Extent, groups: RowGroups) -> None:
    """Raise ModelError if q, k and v of one layer have other heads than the configuration has for all layers."""
    rows = sum(groups.get(parsed.roles, ()))
    if parsed.roles in (("q", "k", "v"), ("q_bias", "k_bias", "v_bias")) and rows not in (0, extent.shape[0]):
        raise ModelError(
            f"{extent.file.path}: tensor {extent.name} has {extent.shape[0]} rows, but its 3 parts have {rows}."
        )


def _factors(file: MappedFile, name: str, tensor: GgufTensor) -> list[float]:
    """Divisors of rotary frequencies: what Llama 3's scaling comes to, or LongRoPE's."""
    if tensor.stored.name != "F32" or math.prod(tensor.shape) != tensor.shape[-1]:
        raise ModelError(f"{file.path}: {name} must be a vector of F32.")
    if tensor.offset + tensor.nbytes > file.size:  # a header alone
        return [1.0] * tensor.shape[-1]
    return [float(value) for value in file.view(tensor.offset, tensor.nbytes).view(np.float32)]


def _mark_permuted(extents: dict[Key, Extent], config: dict[str, Any], path: Path) -> None:
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for key, extent in extents.items():
        if key.role in {"q", "k", "q_bias", "k_bias"}:
            count = heads[key.role[0]]
            if count < 1 or extent.shape[0] % (2 * count):
                raise ModelError(
                    f"{path}: tensor {extent.name} has {extent.shape[0]} rows, not {count} even heads."
                )
            extents[key] = in_heads(extent, count)
