"""Rows of CSV and TSV files with a header, and of Parquet files, as lines of JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from mpillm.batch.rows.line import MAX_LINE, error_line, row_line
from mpillm.errors import JobError

ROWS, BYTES = 1024, 16 << 20  # of a Parquet file that are read at once, at most
SKIPPED = 1 << 16  # characters of a line that is too long that are read at once

Check = Callable[[list[str]], None]  # of the columns that a table has
Reader = Callable[[io.BufferedReader, Path, Check], Iterator[bytes]]


def _table(delimiter: str) -> Reader:
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
                line = self._text.readline(SKIPPED)
            raise csv.Error(f"a line of it is longer than {MAX_LINE >> 20} MiB")
        return line


def _records(reader: Iterator[list[str]], header: list[str]) -> Iterator[bytes]:
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error_line(str(error))
            continue
        if len(row) == len(header):
            yield row_line(dict(zip(header, row, strict=True)))
        elif row:  # no blank line
            yield error_line(f"the row has {len(row)} field(s), and the header has {len(header)}")


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
                yield from map(row_line, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise JobError(f"The input {path} is no Parquet file, or damaged: {error}.") from None


READERS: dict[str, Reader] = {
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}
