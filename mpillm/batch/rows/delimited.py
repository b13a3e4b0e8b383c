"""CSV and TSV with a header, whose records become lines."""

from __future__ import annotations

import csv
import enum
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from mpillm.batch.rows.line import MAX_LINE, byte_count, row_line, wrong_row
from mpillm.errors import JobError

CHUNK = 1 << 16  # characters that are read at once
_SEPARATOR = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)  # Excel reads it above the header
_QUOTED = re.compile(r'"[^"]*(?:"|$)')


def records(
    file: io.BufferedReader, path: Path, check: Callable[[list[str]], None], delimiters: str
) -> Iterator[bytes]:
    """Yield the records below the header as lines; `check` is called with the header. JobError if there is no header.

    Of the `delimiters` the one counts that the header has most often.
    """
    csv.field_size_limit(MAX_LINE)
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        lines = _Lines(text, delimiters)
        reader = csv.reader(lines, delimiter=lines.delimiter)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise JobError(f"The input {path} has no header: {error}.") from None
        # As pandas calls a column without a name, such as that of row names which it writes itself.
        header = [name or f"Unnamed: {number}" for number, name in enumerate(header) if any(header)]
        if not header or len(set(header)) < len(header):
            raise JobError(f"The input {path} needs a first line with a different name for each column.")
        check(header)
        while True:
            begin = lines.next_record()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines.pass_over()
                yield wrong_row(f"line {begin} of the input: {error}")
                continue
            if lines.unclosed:
                yield wrong_row(
                    f"a quote in the record that begins in line {begin} of the input is not closed"
                )
            elif len(row) == len(header):
                yield row_line(dict(zip(header, row, strict=True)))
            elif row:  # no blank line
                yield wrong_row(f"the row has {len(row)} field(s), and the header has {len(header)}")


class _Lines:
    """The lines of a text, record by record; csv.Error in place of a line that makes a record too long to be held."""

    def __init__(self, text: IO[str], delimiters: str) -> None:
        self._text = text
        self._number = 0  # lines read
        self._first = text.readline(CHUNK)  # a line, or the beginning of it, that was read before its turn
        if (said := _SEPARATOR.fullmatch(self._first)) is not None:
            delimiters, self._number, self._first = said[1], 1, text.readline(CHUNK)
        unquoted = _QUOTED.sub("", self._first)
        self.delimiter = max(delimiters, key=unquoted.count)
        self._record: list[str] = []  # the lines of the record so far
        self._length = 0  # bytes of them
        self.unclosed = False  # the text has ended where the record wants another line

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        pieces: list[str] = []
        while piece := self._first or self._text.readline(CHUNK):
            self._first = ""
            pieces.append(piece)
            self._length += byte_count(piece)
            if piece.endswith(("\n", "\r")) or self._length > MAX_LINE:
                break
        if not pieces:
            self.unclosed = bool(self._record)
            raise StopIteration
        self._number += 1
        self._record.append("".join(pieces))
        if self._length > MAX_LINE:
            raise csv.Error(f"the record is longer than {MAX_LINE >> 20} MiB")
        return self._record[-1]

    def next_record(self) -> int:
        """Begin a record, and return the number of its first line."""
        self._record.clear()
        self._length = 0
        return self._number + 1

    def pass_over(self) -> None:
        """Read up to the end of the record, of which no more is held than what was read."""
        end = _RecordEnd(self.delimiter)
        ended = any(end.passed(line) for line in self._record)
        self._record.clear()
        while not ended and (piece := self._text.readline(CHUNK)):
            ended = end.passed(piece)
            self._number += piece.endswith(("\n", "\r"))


class _Place(enum.Enum):
    """Where in a record a character is."""

    FIELD_START = enum.auto()
    UNQUOTED = enum.auto()
    QUOTED = enum.auto()
    AFTER_QUOTE = enum.auto()  # behind a quote in a quoted field, which ends it or is the first of two


class _RecordEnd:
    """Finds the end of a record as the csv module does: a line's end in a quoted field does not end it."""

    def __init__(self, delimiter: str) -> None:
        self._place = _Place.FIELD_START
        self._delimiter = delimiter
        self._next = re.compile(rf'[\r\n]|{re.escape(delimiter)}(?=")')  # the end, or before a quoted field

    def passed(self, piece: str) -> bool:
        """Return whether the record ends with this piece of it, which has no line's end but at its own end."""
        at = 0
        while at < len(piece):
            if self._place is _Place.FIELD_START and piece[at] == '"':
                self._place, at = _Place.QUOTED, at + 1
            elif self._place is _Place.QUOTED:
                quote = piece.find('"', at)
                if quote < 0:
                    return False
                self._place, at = _Place.AFTER_QUOTE, quote + 1
            elif self._place is _Place.AFTER_QUOTE and piece[at] == '"':
                self._place, at = _Place.QUOTED, at + 1
            else:
                found = self._next.search(piece, at)
                if found is None:
                    whole = piece.endswith(self._delimiter)
                    self._place = _Place.FIELD_START if whole else _Place.UNQUOTED
                    return False
                if found[0] != self._delimiter:
                    return True
                self._place, at = _Place.FIELD_START, found.end()
        return False
