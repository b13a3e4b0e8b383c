"""The form of an input: compressed or not; a JSON array, a table or lines of JSON. Rows become lines of JSON."""

from __future__ import annotations

import io
import json
import shutil
from itertools import chain
from pathlib import Path
from typing import IO, BinaryIO

from mpillm.batch.rows import json_array, tables
from mpillm.batch.rows.compressed import GZIP, STDIN, ZSTD, ChunkFile, unpacked
from mpillm.batch.rows.tables import Check
from mpillm.errors import JobError

HEAD = 1 << 12  # bytes that tell what an input is
FIRST_LINE = 1 << 18  # bytes of a first line that are looked at, if it begins like an array
_PARQUET = b"PAR1"


def is_lines(path: Path) -> bool:
    """Whether an input is read as it is: an object a line, in a file that can be read again."""
    if str(path) == STDIN:
        return False
    try:
        with path.open("rb") as file:
            head = _head(file)
    except OSError:
        return True  # which says what is wrong
    return not (head.startswith((GZIP, ZSTD, _PARQUET)) or _suffix(path) in tables.READERS or _is_array(head))


def needs_arrow(path: Path) -> bool:
    """Whether the input is read by pyarrow."""
    return _suffix(path) == ".parquet"


def write_lines(path: Path, target: IO[bytes], check: Check) -> None:
    """Write the rows of an input as lines of JSON; JobError if it cannot be read.

    `check` is called with the columns of a table, before its first row.
    """
    with unpacked(path) as file:
        reader = tables.READERS.get(_suffix(path))
        if reader is not None:
            for line in reader(file, path, check):
                target.write(line + b"\n")
        elif file.peek(len(_PARQUET)).startswith(_PARQUET):
            raise JobError(f"The input {path} is Parquet; give it as a file whose name ends in .parquet.")
        elif _is_array(head := _head(file)):
            rest = iter(lambda: file.read(json_array.CHUNK), b"")
            for line in json_array.elements(io.BufferedReader(ChunkFile(chain([head], rest))), path):
                target.write(line + b"\n")
        else:
            target.write(head)
            shutil.copyfileobj(file, target, 1 << 20)


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
