"""Inputs of other forms than an object a line: rows become lines of JSON, one by one, in bounded memory.

The forms are compressed files (gzip, zstd), JSON arrays, CSV and TSV with a header, Parquet, and standard input. What
is wrong with a row is said in place of it, under the key `ROW_ERROR`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import msgspec

from mpillm.errors import JobError

STDIN = "-"
ROW_ERROR = "mpillm: row"  # the key of a row that could not be read
MAX_LINE = 8 * 2**20  # bytes; a longer line is an error result, and is never held in memory as a whole
ROWS, BYTES = 1024, 16 << 20  # of a Parquet file that are read at once, at most
HEAD = 1 << 12  # bytes that tell what an input is
FIRST_LINE = 1 << 18  # bytes of a first line that are looked at, if it begins like an array
CHUNK = 1 << 16  # characters of an array that are read at once
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"

_MARK, _AFTER = re.compile(r'["\[\]{}]'), re.compile(r"[,\]\s]")  # in a nested value, and behind a number

Check = Callable[[list[str]], None]  # of the columns that a table has


def is_lines(path: Path) -> bool:
    """Whether an input is read as it is: an object a line, in a file that can be read again."""
    if str(path) == STDIN:
        return False
    try:
        with path.open("rb") as file:
            head = _head(file)
    except OSError:
        return True  # which says what is wrong
    return not (head.startswith((_GZIP, _ZSTD, _PARQUET)) or _suffix(path) in _READERS or _is_array(head))


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
        elif file.peek(len(_PARQUET)).startswith(_PARQUET):
            raise JobError(f"The input {path} is Parquet; give it as a file whose name ends in .parquet.")
        elif _is_array(head := _head(file)):
            rest = iter(lambda: file.read(CHUNK), b"")
            for line in _array(io.BufferedReader(_Chunks(chain([head], rest))), path):
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


def _table(delimiter: str) -> Callable[[io.BufferedReader, Path, Check], Iterator[bytes]]:
    """Reads rows of texts below a header."""

    def rows(file: io.BufferedReader, path: Path, check: Check) -> Iterator[bytes]:
        csv.field_size_limit(MAX_LINE)
        with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
            reader = csv.reader(_ShortLines(text), delimiter=delimiter)
            try:
                header = next(reader, [])
            except csv.Error as error:
                raise JobError(f"The input {path} has no header: {error}.") from None
            if not header or len(set(header)) < len(header) or "" in header:
                raise JobError(
                    f"The input {path} needs a first line that names its columns, each differently."
                )
            check(header)
            yield from _records(reader, header)

    return rows


class _ShortLines:
    """The lines of a text; csv.Error in place of one that is too long to be held."""

    def __init__(self, text: IO[str]) -> None:
        self._text = text

    def __iter__(self) -> _ShortLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_LINE + 1)
        if not line:
            raise StopIteration
        if len(line) > MAX_LINE:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(CHUNK)
            raise csv.Error(f"a line of it is longer than {MAX_LINE >> 20} MiB")
        return line


def _records(reader: Iterator[list[str]], header: list[str]) -> Iterator[bytes]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _wrong(str(error))
            continue
        if len(row) == len(header):
            yield _line(dict(zip(header, row, strict=True)))
        elif row:  # no blank line
            yield _wrong(f"the row has {len(row)} field(s), and the header has {len(header)}")


def _parquet(file: io.BufferedReader, path: Path, check: Check) -> Iterator[bytes]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise JobError("An input in Parquet needs a library: pip install 'mpillm[tables]'.") from None
    try:
        table = parquet.ParquetFile(file, pre_buffer=False)
        check(list(table.schema_arrow.names))
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            row = group.total_byte_size // max(group.num_rows, 1) + 1  # bytes
            rows = max(1, min(ROWS, BYTES // row))
            for batch in table.iter_batches(rows, row_groups=[number], use_threads=False):
                yield from map(_line, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise JobError(f"The input {path} is no Parquet file, or damaged: {error}.") from None


def _array(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The elements of a JSON array, as they are but for line ends between their tokens.

    One that is malformed, nested too deeply or too long costs no other, as long as its end can be found.
    """
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape") as characters:
        text = _Text(characters, path)
        if text.next() != "[":
            raise text.wrong("it does not begin with '['")
        text.at += 1
        character = text.next()
        while character != "]":
            element = text.element()
            yield _TOO_LONG if element is None else element.encode("utf-8", "surrogateescape")
            character = text.next()
            if character == ",":
                text.at += 1
                text.next()
            elif character != "]":
                raise text.wrong("a comma or the end is missing")
        text.at += 1
        if text.next():
            raise text.wrong("something follows its end")


class _Text:
    """JSON that is read piece by piece, of which no more is held than an element and a chunk."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # whose values nobody looks at
        self._held, self._before, self._ended = "", 0, False  # characters that are no longer held
        self._taken: list[str] = []  # pieces of the element that is being taken
        self._length = 0  # characters of that element so far
        self.at = 0  # in what is held

    def next(self) -> str:
        """The next character that is no space, which is not taken; "" at the end."""
        while True:
            while self.at < len(self._held):
                if not self._held[self.at].isspace():
                    return self._held[self.at]
                self.at += 1
            if not self._more():
                return ""

    def element(self) -> str | None:
        """Take the value that begins here, well-formed or not, on one line; None if it is too long to be held.

        A line end in a string becomes a zero character, which JSON does not allow there.
        """
        if self.next() in ("", ",", "]", "}"):
            raise self.wrong("an element is missing")
        if self._held[self.at] in '"[{':
            try:
                _, end = self._decoder.raw_decode(self._held, self.at)
                self._take(end)
            except (ValueError, RecursionError):  # it is malformed, or goes on behind what is held
                self._take_nested()
        else:
            self._take_scalar()
        taken = "".join(self._taken) if self._length <= MAX_LINE else None
        self._taken, self._length = [], 0
        return taken

    def _take(self, end: int, line_end: str = " ") -> None:
        piece, self.at = self._held[self.at : end], end
        self._length += len(piece)
        if self._length > MAX_LINE:
            self._taken.clear()
        else:
            self._taken.append(piece.replace("\r", line_end).replace("\n", line_end))

    def _take_nested(self) -> None:
        """Take a string, an array or an object: up to the bracket that closes the first one, of whatever kind."""
        depth = 0
        while True:
            found = _MARK.search(self._held, self.at)
            if found is None:
                self._take(len(self._held))
                self._need_more()
                continue
            self._take(found.end())
            if found[0] == '"':
                self._take_string()
            else:
                depth += 1 if found[0] in "[{" else -1
            if depth == 0:
                return

    def _take_string(self) -> None:
        """Take the rest of a string, behind its first quote."""
        escapes = 0  # backslashes at the end of what was taken, modulo 2
        while True:
            quote = self._held.find('"', self.at)
            end = quote if quote >= 0 else len(self._held)
            text = self._held[self.at : end]
            run = len(text) - len(text.rstrip("\\"))
            escapes = (run + (escapes if run == len(text) else 0)) % 2
            self._take(end + (quote >= 0), line_end="\0")
            if quote < 0:
                self._need_more()
            elif not escapes:
                return
            else:
                escapes = 0

    def _take_scalar(self) -> None:
        while (found := _AFTER.search(self._held, self.at)) is None:
            self._take(len(self._held))
            if not self._more():
                return
        self._take(found.start())

    def _need_more(self) -> None:
        if not self._more():
            raise self.wrong("the end of an element is missing")

    def wrong(self, what: str) -> JobError:
        """The error for what is wrong here."""
        where = self._before + self.at + 1
        return JobError(f"The input {self._path} is no JSON array: {what} at character {where}.")

    def _more(self) -> bool:
        """Read on; False at the end."""
        chunk = self._file.read(max(CHUNK, len(self._held) - self.at))
        self._ended = not chunk
        self._held, self._before, self.at = self._held[self.at :] + chunk, self._before + self.at, 0
        return not self._ended


_READERS: dict[str, Callable[[io.BufferedReader, Path, Check], Iterator[bytes]]] = {
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}


def _suffix(path: Path) -> str:
    """The suffix that tells what an input is, without that of its compression."""
    plain = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return plain.suffix.lower()


def _head(file: BinaryIO) -> bytes:
    """The beginning of a file; where it may be that of an array, with all of the first line and more."""
    head = file.read(HEAD)
    if _text_of(head).startswith(b"[") and b"\n" not in head:
        head += file.readline(FIRST_LINE) + file.read(HEAD)
    return head


def _text_of(head: bytes) -> bytes:
    """The beginning of a file without a byte order mark and white space before its text."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def _is_array(head: bytes) -> bool:
    """Whether JSON that begins with `head` is one array; a list may also be a line among others, which is an error."""
    text = _text_of(head)
    if not text.startswith(b"["):
        return False
    first, _, rest = text.partition(b"\n")
    if not rest.strip():
        return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        # In an array, an object at the beginning of a line follows one of these.
        return not rest.lstrip().startswith(b"{") or first.rstrip().endswith((b"[", b",", b":"))
    return False


def _line(row: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(row, enc_hook=str)
    except (UnicodeEncodeError, ValueError, TypeError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeEncodeError) else f"is no JSON: {error}"
        return _wrong(f"the row {what}")


def _wrong(what: str) -> bytes:
    return msgspec.json.encode({ROW_ERROR: what})


_TOO_LONG = _wrong(f"the line is longer than {MAX_LINE >> 20} MiB")
