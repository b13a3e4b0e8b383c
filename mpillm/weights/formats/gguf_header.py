"""The header of a GGUF file: metadata and tensor descriptions, with every count, length and offset checked.

The gguf library's own reader believes what a file says; this one refuses it in a sentence, and allocates nothing that
the file does not hold. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpillm.errors import ModelError
from mpillm.weights.formats.stored import Stored, stored_in_gguf
from mpillm.weights.io.mapped import MappedFile

VERSIONS = (2, 3)
MAX_FIELDS = 2**16
MAX_TENSORS = 2**20
MAX_ITEMS = 2**24  # the maximum items of one metadata array
MAX_STRING = 2**26
MAX_DIMS = 4
MAX_ALIGNMENT = 2**20

ALIGNMENT = 32  # where the file does not say
# The numbers of the types of metadata. (The gguf library has them, but takes 25 ms to import.)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class GgufTensor(NamedTuple):
    """A tensor of the file: shape with the outermost dimension first, offset from the beginning of the file."""

    shape: tuple[int, ...]
    stored: Stored
    offset: int
    nbytes: int


class GgufHeader(NamedTuple):
    """The header of a file: metadata as Python values (arrays are lists), tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(file: MappedFile, whole: bool = True) -> GgufHeader:
    """Metadata and tensors of a GGUF file (version 2 or 3, little endian); ModelError if anything is amiss.

    Without `whole` the tensors' data may be missing, in part or all of it.
    """
    cursor = _Cursor(file)
    if file.size < 24 or file.view(0, 4).tobytes() != b"GGUF":
        parent = Path(file.path).absolute().parent
        kinds = "a model is a GGUF file, a Hugging Face directory or a name of the catalogue"
        meant = f"the model is its directory, {parent}" if (parent / "config.json").exists() else kinds
        raise ModelError(f"{file.path} is not a GGUF file; {meant}.")
    cursor.at = 4
    version = cursor.integer("<I")
    if version & 0xFFFF == 0:
        raise ModelError(f"{file.path} is a big-endian GGUF file; only little-endian ones can be read.")
    if version not in VERSIONS:
        raise ModelError(f"{file.path} has GGUF version {version}; versions 2 and 3 can be read.")
    n_tensors, n_fields = cursor.integer("<Q"), cursor.integer("<Q")
    if n_fields > MAX_FIELDS or n_tensors > MAX_TENSORS:
        raise broken(file, f"it announces {n_fields} metadata fields and {n_tensors} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(n_fields):
        name = cursor.string("the name of a metadata field")
        if name in metadata:
            raise broken(file, f"metadata field {name[:80]!r} occurs twice")
        metadata[name] = cursor.value(cursor.integer("<I"), name)
    described = [cursor.tensor() for _ in range(n_tensors)]
    begin = -(-cursor.at // _alignment(file, metadata)) * _alignment(file, metadata)
    size = file.size if whole else sys.maxsize
    return GgufHeader(metadata, _placed(file, described, begin, _alignment(file, metadata), size))


def architecture_in(begin: bytes) -> str | None:
    """Return the architecture that the first bytes of a GGUF file name; None if they do not."""
    key = b"general.architecture" + struct.pack("<I", _STRING)
    at = begin.find(key) + len(key)
    if not begin.startswith(b"GGUF") or key not in begin or len(begin) < at + 8:
        return None
    length = int.from_bytes(begin[at : at + 8], "little")
    name = begin[at + 8 : at + 8 + length]
    return name.decode("utf-8", "replace") if 0 < length == len(name) else None


def broken(file: MappedFile, problem: str) -> ModelError:
    return ModelError(f"{file.path} is not a sound GGUF file: {problem}; fetch the model again.")


class _Cursor:
    """Reads a file from front to back; what would lie beyond its end is a ModelError."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0

    def take(self, nbytes: int) -> memoryview:
        if nbytes > self.file.size - self.at:
            raise broken(self.file, f"its header reaches beyond its end ({self.file.size} bytes)")
        self.at += nbytes
        return self.file.view(self.at - nbytes, nbytes).data

    def integer(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def string(self, what: str) -> str:
        length = self.integer("<Q")
        if length > MAX_STRING:
            raise broken(self.file, f"{what} has a length of {length} bytes")
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise broken(self.file, f"{what} is not UTF-8") from None

    def value(self, code: int, name: str) -> Any:
        """Return a metadata value of the type with that number."""
        shown = f"metadata field {name[:80]!r}"
        if code == _STRING:
            return self.string(shown)
        if code == _ARRAY:
            return self._array(shown)
        return self._scalars(code, 1, shown)[0]

    def _array(self, shown: str) -> list[Any]:
        code, count = self.integer("<I"), self.integer("<Q")
        if code == _ARRAY:
            raise broken(self.file, f"{shown} is an array of arrays")
        if count > MAX_ITEMS:
            raise broken(self.file, f"{shown} announces {count} items")
        if code != _STRING:
            return self._scalars(code, count, shown)
        if 8 * count > self.file.size - self.at:  # each has at least its length
            raise broken(self.file, f"{shown} announces {count} strings, more than the file can hold")
        found = self._short_strings(count)
        return self._strings(count, shown) if found is None else found

    def _short_strings(self, count: int) -> list[str] | None:
        """Read short strings without NUL, decoded all at once; None if some are not so.

        Of less than 256 bytes, and of 56 on average.
        """
        read = self.file.view(self.at, min(64 * count, self.file.size - self.at))
        data, at = read.tobytes(), 0
        heads: list[int] = []
        add = heads.append
        try:
            for _ in range(count):
                add(at)
                at += 8 + data[at]  # the lowest byte of its length
        except IndexError:
            return None
        if at > len(data):
            return None
        joined, lengths = np.array(read[:at]), np.array(heads, np.int64)
        kept = np.ones(at, bool)
        for i in range(1, 8):
            if joined[lengths + i].any():
                return None
            kept[lengths + i] = False
        joined[lengths] = 0
        try:
            found = joined[kept].tobytes().decode().split("\0")[1:]
        except UnicodeDecodeError:
            return None
        if len(found) != count:
            return None
        self.at += at
        return found

    def _strings(self, count: int, shown: str) -> list[str]:
        """Read strings like `string`, but without a call for each: a vocabulary has hundreds of thousands."""
        data, at, size = self.file.map, self.at, self.file.size
        unpack = struct.Struct("<Q").unpack_from
        result = []
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8
                if length > size - at:
                    raise broken(self.file, f"{shown} reaches beyond the end of the file")
                result.append(data[at : at + length].decode())
                at += length
        except struct.error:
            raise broken(self.file, f"{shown} reaches beyond the end of the file") from None
        except UnicodeDecodeError:
            raise broken(self.file, f"{shown} has a string that is not UTF-8") from None
        self.at = at
        return result

    def _scalars(self, code: int, count: int, shown: str) -> list[Any]:
        if code not in _SCALARS:
            raise broken(self.file, f"{shown} has the unknown type {code}")
        kind = np.dtype(_SCALARS[code])
        values: list[Any] = np.frombuffer(self.take(count * kind.itemsize), kind).tolist()
        return values

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return a tensor's name, shape, type number and offset in the data."""
        name = self.string("the name of a tensor")
        shown = f"tensor {name[:80]!r}"
        ndim = self.integer("<I")
        if not 1 <= ndim <= MAX_DIMS:
            raise broken(self.file, f"{shown} has {ndim} dimensions")
        shape = tuple(reversed([self.integer("<Q") for _ in range(ndim)]))
        if math.prod(shape) > 2**62:
            raise broken(self.file, f"{shown} has the impossible shape {list(shape)}")
        return name, shape, self.integer("<I"), self.integer("<Q")


def _alignment(file: MappedFile, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise broken(file, f"general.alignment is {str(value)[:40]}, which is not a power of two")
    return value


def _placed(
    file: MappedFile,
    described: list[tuple[str, tuple[int, ...], int, int]],
    begin: int,
    alignment: int,
    size: int,
) -> dict[str, GgufTensor]:
    """Return the tensors by name, all within a file of `size` bytes, none over another."""
    tensors: dict[str, GgufTensor] = {}
    for name, shape, code, offset in described:
        shown = f"tensor {name[:80]!r}"
        if name in tensors:
            raise broken(file, f"{shown} occurs twice")
        stored = stored_in_gguf(code)
        if stored is None:
            raise ModelError(
                f"{file.path}: {shown} has block type {code}, which is unknown or cannot be decoded."
            )
        if shape[-1] % stored.block:
            raise broken(file, f"{shown} has rows of {shape[-1]} values, not whole blocks of {stored.name}")
        nbytes = math.prod(shape[:-1]) * stored.row_bytes(shape[-1])
        if offset % alignment:
            raise broken(file, f"the offset of {shown} is not a multiple of {alignment}")
        if begin + offset + nbytes > size:
            raise broken(file, f"{shown} reaches beyond its end ({size} bytes)")
        tensors[name] = GgufTensor(shape, stored, begin + offset, nbytes)
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise broken(file, f"tensor {name[:80]!r} overlaps another one")
        end = tensor.offset + tensor.nbytes
    return tensors
