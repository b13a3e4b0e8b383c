"""Parquet, whose rows become lines."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpillm.batch.rows.line import row_line, wrong_row
from mpillm.errors import JobError

ROWS, BYTES = 1024, 16 << 20  # that are read, and made values of Python, at once, at most


def rows(file: io.BufferedReader, path: Path, check: Callable[[list[str]], None]) -> Iterator[bytes]:
    """The rows as lines; `check` is called with the names of the columns. JobError if it cannot be read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise JobError("A Parquet input needs a library: pip install 'mpillm[tables]'.") from None
    try:
        metadata = parquet.read_metadata(file)
        # A text that a column has once in its dictionary stays one in memory, however many rows have it.
        table = parquet.ParquetFile(
            file, metadata=metadata, pre_buffer=False, read_dictionary=_dictionaries(metadata)
        )
        check(list(table.schema_arrow.names))
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            row = group.total_byte_size // max(group.num_rows, 1) + 1  # bytes
            for batch in table.iter_batches(
                max(1, min(ROWS, BYTES // row)), row_groups=[number], use_threads=False
            ):
                batch = _in_microseconds(batch)
                at_once = max(1, BYTES // max(1, sum(map(_longest, batch.columns))))
                for begin in range(0, len(batch), at_once):
                    yield from _lines(batch.slice(begin, at_once))
    except pyarrow.ArrowException as error:
        raise JobError(f"The input {path} is damaged or not a Parquet file: {error}.") from None


def _lines(batch: Any) -> Iterator[bytes]:
    """The rows of a batch; a row with a value that Python lacks, such as a date beyond the year 9999, is wrong."""
    try:
        rows = batch.to_pylist()
    except (OverflowError, ValueError) as error:
        if len(batch) == 1:
            yield wrong_row(f"the row has a value that cannot be read: {error}")
            return
        for index in range(len(batch)):
            yield from _lines(batch.slice(index, 1))
        return
    yield from map(row_line, rows)


def _in_microseconds(batch: Any) -> Any:
    """A batch whose times of nanoseconds have microseconds, as Python's have."""
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


def _dictionaries(metadata: Any) -> list[str]:
    """The columns of texts, or of bytes, of which a part has a dictionary."""
    found = set()
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            kind = metadata.schema.column(number).logical_type.type
            if (
                column.physical_type == "BYTE_ARRAY"
                and column.has_dictionary_page
                and kind in ("STRING", "NONE")
            ):
                found.add(column.path_in_schema)
    return sorted(found)


def _longest(column: Any) -> int:
    """Bytes of the longest value of an array of Arrow, or an upper bound of it."""
    import pyarrow
    from pyarrow import compute

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        return _longest(column.dictionary)
    if pyarrow.types.is_string(kind) or pyarrow.types.is_binary(kind):
        return compute.max(compute.binary_length(column)).as_py() or 0
    return int(column.nbytes)
