"""The form of an input: compressed or not; a JSON array, a table or lines of JSON. Rows become lines of JSON."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, cast

from mpillm.batch.lines import temporary_file
from mpillm.batch.rows import delimited, json_array, parquet
from mpillm.batch.rows.compressed import GZIP, STDIN, ZSTD, ChunkFile, uncompressed
from mpillm.batch.rows.json_array import begins_array
from mpillm.errors import JobError
from mpillm.foreign import HEAD, what_it_is

COPY = 1 << 20  # bytes that are copied at once
_PARQUET = b"PAR1"

Check = Callable[[list[str]], None]  # checks the columns of a table
Reader = Callable[[io.BufferedReader, Path, Check], Iterator[bytes]]
_READERS: dict[str, Reader] = {
    ".csv": partial(delimited.records, delimiters=",;\t"),
    ".tsv": partial(delimited.records, delimiters="\t"),
    ".parquet": parquet.rows,
}


def is_lines(path: Path) -> bool:
    """Return whether an input is read as it is: an object a line, in a file that can be read again."""
    if str(path) == STDIN:
        return False
    if not path.is_file():
        return True  # the reader reports it; a pipe would wait for its writer here
    try:
        with path.open("rb") as file:
            head, array = begins_array(file)
    except OSError:
        return True  # the reader reports the error
    return not (array or head.startswith((GZIP, ZSTD, _PARQUET)) or is_table(path))


def is_table(path: Path) -> bool:
    """Return whether an input has columns, whose values may all be texts."""
    return _suffix(path) in _READERS


def needs_arrow(path: Path) -> bool:
    """Return whether the input is read by pyarrow."""
    return _suffix(path) == ".parquet"


def write_lines(
    path: Path, target: IO[bytes], check: Check, open_file: Callable[[], int] = temporary_file
) -> None:
    """Write the rows of an input as lines of JSON; JobError if it cannot be read.

    `check` is called with the columns of a table, before its first row. `open_file` returns the descriptor of a new
    file, for a content that cannot be rewound.
    """
    with uncompressed(path) as file:
        reader = _READERS.get(_suffix(path))
        if reader is not None:
            if (what := what_it_is(file.peek(HEAD)[:HEAD])) is not None:
                raise JobError(f"The input {path} {what}.")
            for line in reader(file, path, check):
                target.write(line + b"\n")
            return
        if file.peek(len(_PARQUET)).startswith(_PARQUET):
            raise JobError(f"The input {path} is Parquet; give it as a file whose name ends in .parquet.")
        head, array = begins_array(file)
        rest = iter(lambda: file.read(json_array.CHUNK), b"")
        content: io.BufferedReader = io.BufferedReader(cast("io.RawIOBase", ChunkFile(chain([head], rest))))
        if array is None:
            content = _kept(content, open_file)
            _, array = begins_array(content)
            content.seek(0)
        with content:
            if array:
                for line in json_array.elements(content, path):
                    target.write(line + b"\n")
            else:
                shutil.copyfileobj(content, target, COPY)


def _kept(content: io.BufferedReader, open_file: Callable[[], int]) -> io.BufferedReader:
    """Return the content in a file, which can be rewound."""
    file = io.BufferedRandom(io.FileIO(open_file(), "r+"))
    shutil.copyfileobj(content, file, COPY)
    file.seek(0)
    return io.BufferedReader(file.detach())


def _suffix(path: Path) -> str:
    """Return the suffix that tells what an input is, without that of its compression."""
    plain = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return plain.suffix.lower()
