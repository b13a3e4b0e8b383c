"""The facts about each line of an input, in an unnamed file, so that millions of lines take little memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator

import msgspec

from mpillm.batch.work import Line
from mpillm.errors import Interrupted

HELD = 1 << 20  # bytes in memory before they are written
READ = 1 << 10  # bytes that are read at first: most lines have no more
_LENGTH = 4  # bytes of the length before each line


class Lines:
    """A growing sequence of lines. Of each one 8 bytes stay in memory: where it is in the file.

    A short input is held as a whole, without a file. Several threads may read while none of them writes.
    """

    def __init__(self, open_file: Callable[[], int] | None = None) -> None:
        """`open_file` returns the descriptor of a new file, which `Lines` closes; by default a temporary one."""
        self._open_file = open_file or temporary_file
        self._file = -1
        self._places = array("q")
        self._held = bytearray()
        self._written = 0  # bytes

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Line:
        place = self._places[index]
        if place >= self._written:
            return _decoded(self._held, place - self._written)
        raw = os.pread(self._file, READ, place)
        length = int.from_bytes(raw[:_LENGTH], "little")
        if length > len(raw) - _LENGTH:
            raw += os.pread(self._file, _LENGTH + length - len(raw), place + len(raw))
        return _decoded(raw, 0)

    def __iter__(self) -> Iterator[Line]:
        return map(self.__getitem__, range(len(self)))

    def append(self, line: Line) -> None:
        """Append a line."""
        self._places.append(self._write(line))

    def replace(self, index: int, line: Line) -> None:
        """Put a line in the place of another one."""
        self._places[index] = self._write(line)

    def _write(self, line: Line) -> int:
        place = self._written + len(self._held)
        raw = msgspec.msgpack.encode(
            (line.number, line.offset, line.length, line.custom_id, line.digest, line.error, line.param)
        )
        self._held += len(raw).to_bytes(_LENGTH, "little") + raw
        if len(self._held) >= HELD:
            self._flush()
        return place

    def _flush(self) -> None:
        try:
            if self._file < 0:
                self._file = self._open_file()
                weakref.finalize(self, os.close, self._file)
            while self._held:
                written = os.pwrite(self._file, self._held, self._written)
                self._written += written
                del self._held[:written]
        except OSError as error:
            raise Interrupted(
                f"The index of the input's lines cannot be written ({error.strerror}): it takes about 100 "
                "bytes for each line on the disk of the output directory; free some space and run the same "
                "command again."
            ) from error


_Stored = tuple[int, int, int, str, bytes, str | None, str | None]


def _decoded(raw: bytes | bytearray, at: int) -> Line:
    begin = at + _LENGTH
    end = begin + int.from_bytes(raw[at:begin], "little")
    return Line(*msgspec.msgpack.decode(memoryview(raw)[begin:end], type=_Stored))


def temporary_file() -> int:
    """Return the descriptor of a new file without a name."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
