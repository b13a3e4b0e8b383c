"""The header of a safetensors file, checked as strictly as the safetensors library checks it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple

from mpillm.errors import ModelError
from mpillm.weights.io.mapped import MappedFile

MAX_HEADER = 100_000_000  # the library's own limit
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_LARGEST = 2**62


class Tensor(NamedTuple):
    """A tensor as the header describes it; `offset` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: MappedFile) -> dict[str, Tensor]:
    """The tensors of a file by name; ModelError if the header is not what the format allows."""
    return read_metadata(file)[0]


def read_metadata(file: MappedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and what its writer says of them in `__metadata__`."""
    if file.size < 8:
        raise _broken(file, f"it has {file.size} bytes and no header")
    length = int.from_bytes(file.view(0, 8).tobytes(), "little")
    if length > MAX_HEADER:
        raise _broken(
            file, f"its header would have {length} bytes, more than the format's limit of {MAX_HEADER}"
        )
    if 8 + length > file.size:
        raise _broken(file, f"its header of {length} bytes reaches beyond its end ({file.size} bytes)")
    header = _json(file, file.view(8, length).tobytes())
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        metadata = {}
    tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_extents(file, tensors, 8 + length)
    return tensors, metadata


def _broken(file: MappedFile, problem: str) -> ModelError:
    return ModelError(f"{file.path} is not a sound safetensors file: {problem}; fetch the model again.")


def _json(file: MappedFile, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise _broken(file, f"its header names {twice[:80]!r} twice")
        return result

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise _broken(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    return header


def _tensor(file: MappedFile, name: str, entry: Any, begin: int) -> Tensor:
    shown = f"tensor {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(file, f"{shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _broken(file, f"{shown} has the unknown dtype {str(dtype)[:40]!r}")
    if not _counts(shape) or len(shape) > 16:
        raise _broken(file, f"{shown} has an impossible shape")
    if not _counts(offsets) or len(offsets) != 2:
        raise _broken(file, f"{shown} has impossible data_offsets")
    bits = _BITS[dtype]
    for dimension in shape:
        bits *= dimension
    start, stop = offsets
    if stop - start != bits // 8 or bits % 8:
        raise _broken(file, f"{shown} has {stop - start} bytes, but its shape and dtype make {bits / 8:g}")
    return Tensor(dtype, tuple(shape), begin + start, stop - start)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _LARGEST for value in values)


def _check_extents(file: MappedFile, tensors: dict[str, Tensor], begin: int) -> None:
    """As in the library: tensors lie one behind the other, without gaps, to the end of the file."""
    order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    ends = [begin, *(tensor.offset + tensor.nbytes for _, tensor in order)]
    for end, (name, tensor) in zip(ends, order, strict=False):
        if tensor.offset < end:
            raise _broken(file, f"tensor {name[:80]!r} overlaps another one")
        if tensor.offset > end:
            raise _broken(file, f"there is a gap of {tensor.offset - end} bytes before tensor {name[:80]!r}")
    if ends[-1] > file.size:
        raise _broken(file, f"it ends after {file.size} of {ends[-1]} bytes")
    if ends[-1] < file.size:
        raise _broken(file, f"it has {file.size - ends[-1]} bytes that belong to no tensor")
