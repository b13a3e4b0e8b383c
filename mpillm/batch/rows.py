"""Inputs of other forms than an object a line: rows become lines of JSON, one by one, in bounded memory.

The forms are compressed files (gzip, zstd), JSON arrays, CSV and TSV with a header, Parquet, and standard input. What
is wrong with a row is said in place of it, under the key `ROW_ERROR` of `row_line`.
"""

from __future__ import annotations

import gzip
import io
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from mpillm.batch import delimited, json_array, parquet
from mpillm.batch.json_array import begins_array
from mpillm.errors import JobError

STDIN = "-"
CHUNK = 1 << 16  # bytes that are read at once
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"

Check = Callable[[list[str]], None]  # of the columns that a table has


def is_lines(path: Path) -> bool:
    """Whether an input is read as it is: an object a line, in a file that can be read again."""
    if str(path) == STDIN:
        return False
    try:
        with path.open("rb") as file:
            head, array = begins_array(file)
    except OSError:
        return True  # which says what is wrong
    return not (array or head.startswith((_GZIP, _ZSTD, _PARQUET)) or _suffix(path) in _READERS)


def needs_arrow(path: Path) -> bool:
    """Whether the input is read by pyarrow."""
    return _suffix(path) == ".parquet"


def write_lines(path: Path, target: IO[bytes], check: Check) -> None:
    """Write the rows of an input as lines of JSON; JobError if it cannot be read.

    `check` is called with the columns of a table, before its first row.
    """
    with _unpacked(path) as file:
        reader = _READERS.get(_suffix(path))
        if reader is not None:
            for line in reader(file, path, check):
                target.write(line + b"\n")
            return
        if file.peek(len(_PARQUET)).startswith(_PARQUET):
            raise JobError(f"The input {path} is Parquet; give it as a file whose name ends in .parquet.")
        head, array = begins_array(file)
        if array:
            rest = iter(lambda: file.read(CHUNK), b"")
            for line in json_array.elements(io.BufferedReader(_Chunks(chain([head], rest))), path):
                target.write(line + b"\n")
        else:
            target.write(head)
            shutil.copyfileobj(file, target, 1 << 20)


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The content of an input, uncompressed; JobError says what is wrong with it."""
    try:
        source = cast("io.BufferedReader", sys.stdin.buffer) if str(path) == STDIN else path.open("rb")
        with source as raw:
            head = raw.peek(4)[:4]
            if head.startswith(_GZIP):
                with gzip.open(raw) as file:
                    yield io.BufferedReader(cast("io.RawIOBase", file))
            elif head.startswith(_ZSTD):
                yield io.BufferedReader(_Chunks(_zstd(raw)))
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise JobError(f"The input {path} is damaged, or not whole (gzip: {error}).") from None
    except OSError as error:
        raise JobError(f"The input {path} cannot be read: {error.strerror or error}.") from None


def _zstd(packed: BinaryIO) -> Iterator[bytes]:
    """The content of a file of zstd frames; OSError if it is damaged."""
    try:
        import zstandard
    except ImportError:
        raise JobError("An input in zstd needs a library: pip install 'mpillm[tables]'.") from None
    frame = None
    try:
        while chunk := packed.read(CHUNK):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise OSError(f"it is damaged ({error})") from None
    if frame is not None:
        raise OSError("it is not whole (zstd)")


class _Chunks(io.RawIOBase):
    """A file to read whose content comes in chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._held = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._held = chunk
        given, self._held = self._held[: len(buffer)], self._held[len(buffer) :]
        buffer[: len(given)] = given
        return len(given)


_READERS: dict[str, Callable[[io.BufferedReader, Path, Check], Iterator[bytes]]] = {
    ".csv": partial(delimited.records, delimiter=","),
    ".tsv": partial(delimited.records, delimiter="\t"),
    ".parquet": parquet.rows,
}


def _suffix(path: Path) -> str:
    """The suffix that tells what an input is, without that of its compression."""
    plain = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return plain.suffix.lower()
