"""The header of a safetensors file: the safetensors library judges it, and we read from it where each tensor lies."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from safetensors import SafetensorError, safe_open

from mpillm.errors import ModelError
from mpillm.weights.io.mapped import MappedFile

_PREFIX = "Error while deserializing header: "
_SHOWN = 200  # characters of the library's words: they may quote the file


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_ENTRY = msgspec.json.Decoder(_Entry)


class SafetensorsTensor(NamedTuple):
    """A tensor as the header describes it; `offset` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: MappedFile) -> dict[str, SafetensorsTensor]:
    """Return the tensors of a file by name; ModelError if the library refuses the file."""
    return read_metadata(file)[0]


def read_metadata(file: MappedFile) -> tuple[dict[str, SafetensorsTensor], dict[str, str]]:
    """Return the tensors of a file by name, and what its writer says of them in `__metadata__`.

    The library checks that tensors lie one behind the other, without gaps, from the header to the end of the file, each
    of the size that its shape and type make. It does not say where they lie, so the header is read once more here.
    """
    try:
        with safe_open(file.path, framework="numpy"):  # reads the header alone
            pass
    except SafetensorError as error:
        raise _unsound(file, str(error)) from None
    except OSError as error:
        raise ModelError(f"{file.path} cannot be read: {error.strerror or error}.") from None
    begin = 8 + int.from_bytes(file.view(0, 8).tobytes(), "little")
    try:
        header = msgspec.json.decode(file.view(8, begin - 8).tobytes(), type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", b"null"), type=dict[str, str] | None)
        entries = {name: _ENTRY.decode(raw) for name, raw in header.items()}
    except msgspec.DecodeError as error:  # the library takes tuples for objects
        raise _unsound(file, str(error)) from None
    tensors = {
        name: SafetensorsTensor(entry.dtype, entry.shape, begin + start, stop - start)
        for name, entry in entries.items()
        for start, stop in [entry.data_offsets]
    }
    return tensors, metadata or {}


def _unsound(file: MappedFile, problem: str) -> ModelError:
    shown = " ".join(problem.removeprefix(_PREFIX).split())[:_SHOWN]
    return ModelError(f"{file.path} is not a sound safetensors file: {shown}; fetch the model again.")
