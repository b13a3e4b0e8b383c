"""Parquet, whose rows become lines."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpillm.batch.rows.line import row_line, wrong_row
from mpillm.errors import JobError
from mpillm.words import on_one_line

ROWS, BYTES = 1024, 4 << 20  # the maximum rows and bytes that are read and converted at once
BUFFER = 1 << 20  # bytes of a column that are read from the file at once; without it all of a row group are
# In the name of a type: bytes of any length, in it or within it.
_BYTES = re.compile("(?<!fixed_size_)binary")


def rows(file: io.BufferedReader, path: Path, check: Callable[[list[str]], None]) -> Iterator[bytes]:
    """Yield the rows as lines; `check` is called with the names of the columns. JobError if it cannot be read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise JobError("A Parquet input needs a library: pip install 'mpillm[tables]'.") from None
    try:
        metadata = parquet.read_metadata(file)
        table = parquet.ParquetFile(file, metadata=metadata, pre_buffer=False, buffer_size=BUFFER)
        check(list(table.schema_arrow.names))
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            row = _row_bytes(file, group)
            for batch in table.iter_batches(
                max(1, min(ROWS, BYTES // row)), row_groups=[number], use_threads=False
            ):
                batch = _in_microseconds(batch)
                at_once = max(1, BYTES // max(1, sum(map(_longest, batch.columns))))
                for begin in range(0, len(batch), at_once):
                    yield from _lines(batch.slice(begin, at_once))
    except pyarrow.ArrowException as error:
        raise JobError(f"The input {path} is damaged or not a Parquet file: {on_one_line(error)}.") from None


def read_at_once(path: Path) -> int:
    """Return the maximum bytes of the rows that are read at once: of a batch, or of a column's largest page."""
    from pyarrow import parquet

    found = 0
    with path.open("rb") as file:
        metadata = parquet.read_metadata(file)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            found = max(found, min(group.total_byte_size, max(BYTES, ROWS * _row_bytes(file, group))))
    return found


def _row_bytes(file: io.BufferedReader, group: Any) -> int:
    """Return about the bytes of a row of a row group: a text that a dictionary has once is that of many rows."""
    columns = [group.column(index) for index in range(group.num_columns)]
    own: int = group.total_byte_size // max(group.num_rows, 1) + 1
    return own + sum(_dictionary_bytes(file, column) for column in columns)


def _lines(batch: Any) -> Iterator[bytes]:
    """Yield the rows of a batch; a row with a value that Python lacks, such as a date in the year 10000, is wrong."""
    try:
        rows = batch.to_pylist()
    except (OverflowError, ValueError) as error:
        if len(batch) == 1:
            yield wrong_row(f"the row has a value that cannot be read: {error}")
            return
        for index in range(len(batch)):
            yield from _lines(batch.slice(index, 1))
        return
    for field in batch.schema:
        if _BYTES.search(str(field.type)):
            for row in rows:
                row[field.name] = _decoded(row[field.name])
    yield from map(row_line, rows)


def _decoded(value: Any) -> Any:
    """Return a value whose bytes are texts, as writers without Parquet's type for them store it; None if not UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_decoded(item) for item in value]
    return value


def _in_microseconds(batch: Any) -> Any:
    """Return a batch whose times of nanoseconds have microseconds, as Python's have."""
    import pyarrow
    from pyarrow import types

    for index, field in enumerate(batch.schema):
        kind, column = field.type, batch.column(index)
        if getattr(kind, "unit", None) != "ns":
            continue
        if types.is_timestamp(kind):
            column = column.cast(pyarrow.timestamp("us", kind.tz), safe=False)
        else:
            column = column.cast(
                pyarrow.duration("us") if types.is_duration(kind) else pyarrow.time64("us"), safe=False
            )
        batch = batch.set_column(index, field.name, column)
    return batch


def _dictionary_bytes(file: io.BufferedReader, column: Any) -> int:
    """Return bytes of the dictionary of a column in a row group, which no text in it exceeds; 0 if there is none.

    The header of the dictionary's page has them as its second number, in Thrift's compact protocol: a byte for field
    and type (0x15: the next field, 32 bits) precedes each number, and each byte of a number has 7 bits of it.
    """
    if column.physical_type != "BYTE_ARRAY" or not column.has_dictionary_page:
        return 0
    file.seek(column.dictionary_page_offset)
    numbers = re.match(rb"\x15[\x80-\xff]*[\x00-\x7f]\x15([\x80-\xff]*[\x00-\x7f])", file.read(32), re.DOTALL)
    if numbers is None:
        return int(column.total_uncompressed_size)
    size: bytes = numbers[1]  # the lowest bit of the size is the sign
    return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(size)) >> 1


def _longest(column: Any) -> int:
    """Return bytes of the longest value of an array of Arrow, or an upper bound of it."""
    import pyarrow
    from pyarrow import compute

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        return _longest(column.dictionary)
    if pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind):
        return compute.max(compute.binary_length(column)).as_py() or 0
    return int(column.nbytes)
