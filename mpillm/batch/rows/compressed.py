"""The content of an input that may be compressed: gzip, zstd, or neither; from a file or from standard input."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from mpillm.errors import FULL, JobError
from mpillm.words import on_one_line

STDIN = "-"  # the path that stands for standard input
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # with which such files begin
CHUNK = 1 << 16  # bytes that are uncompressed at once


@contextmanager
def uncompressed(path: Path) -> Iterator[io.BufferedReader]:
    """The content of an input, uncompressed; JobError says what is wrong with it."""
    try:
        source = cast("io.BufferedReader", sys.stdin.buffer) if str(path) == STDIN else path.open("rb")
        with source as raw:
            head = raw.peek(4)[:4]
            if head.startswith(GZIP):
                with gzip.open(raw) as file:
                    yield io.BufferedReader(cast("io.RawIOBase", file))
            elif head.startswith(ZSTD):
                yield io.BufferedReader(ChunkFile(_zstd(raw)))
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise JobError(f"The input {path} is damaged or incomplete (gzip: {error}).") from None
    except OSError as error:
        if error.errno in FULL:  # where the content goes
            raise
        said = error.strerror or on_one_line(error)
        raise JobError(f"The input {path} cannot be read: {said}.") from None


def _zstd(packed: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a file of zstd frames; OSError if it is damaged."""
    try:
        import zstandard
    except ImportError:
        raise JobError("A zstd input needs a library: pip install 'mpillm[tables]'.") from None
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
        raise OSError("it is incomplete (zstd)")


class ChunkFile(io.RawIOBase):
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
