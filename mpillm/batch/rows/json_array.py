"""The elements of a JSON array, one by one: a file of any length is read in the memory of its longest element."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

import msgspec

from mpillm.batch.rows.line import MAX_LINE, byte_count, wrong_row
from mpillm.errors import JobError

HEAD = 1 << 12  # bytes that tell what an input is
CHUNK = 1 << 16  # characters that are read at once
# The characters that matter in a nested value, and those after a number.
_MARK, _AFTER = re.compile(r'["\[\]{}]'), re.compile(r"[,\]\s]")
_BEGIN, _VISIBLE = re.compile(rb"(?:\xef\xbb\xbf)?\s*\["), re.compile(rb"\S")
_TOO_LONG = wrong_row(f"the line is longer than {MAX_LINE >> 20} MiB")


def begins_array(file: BinaryIO) -> tuple[bytes, bool | None]:
    """Read the beginning of a file; return it, and whether the file is one array.

    A list may also be a line among others, which is an error of that line. What the first line is and what follows it
    tell them apart. A first line that is longer than a line may be is looked at as a whole; if the file cannot be
    rewound then, the answer is None.
    """
    head = file.read(HEAD)
    begin = _BEGIN.match(head)
    if begin is None:
        return head, False
    if head.find(b"\n", begin.end()) < 0:
        head += file.readline(MAX_LINE) + file.read(HEAD)
    end = head.find(b"\n", begin.end())
    if end < 0:
        return head, _goes_on(*_around_first_line_end(file)) if file.seekable() else None
    visible = _VISIBLE.search(head, end)
    if visible is None:
        return head, True
    with suppress(msgspec.DecodeError, RecursionError):
        msgspec.json.decode(memoryview(head)[begin.end() - 1 : end], type=msgspec.Raw)
        return head, False
    return head, _goes_on(head[:end].rstrip()[-1:], visible[0])


def _goes_on(last: bytes, first: bytes) -> bool:
    """Return whether two lines are of one array: the first ends with `last`, the second begins with `first`."""
    if first == b"{":  # in an array, an object at the beginning of a line follows one of these
        return last in (b"[", b",", b":")
    return last != b"]" or first in (b"", b",", b"]", b"}")


def _around_first_line_end(file: BinaryIO) -> tuple[bytes, bytes]:
    """Return the last visible character before the next end of a line and the first one behind it, if there are any."""
    at, last = file.tell(), b""
    while piece := file.readline(CHUNK):
        last = piece.rstrip()[-1:] or last
        if piece.endswith(b"\n"):
            break
    first = file.read(HEAD).lstrip()[:1]
    file.seek(at)
    return last, first


def elements(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """Yield the elements of the array in `file`, unchanged but for line ends between tokens; JobError if it is none.

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
        self._decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # values do not matter
        self._held, self._before, self._ended = "", 0, False  # characters that are no longer held
        self._taken: list[str] = []  # pieces of the element that is being taken
        self._length = 0  # bytes of that element so far
        self.at = 0  # the position in the bytes that are held

    def next(self) -> str:
        """Return the next character that is no space, which is not taken; "" at the end."""
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
        self._length += byte_count(piece)
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
        """Return the error for this place of the file."""
        where = self._before + self.at + 1
        return JobError(f"The input {self._path} is not a JSON array: {what} at character {where}.")

    def _more(self) -> bool:
        """Read on; False at the end."""
        chunk = self._file.read(max(CHUNK, len(self._held) - self.at))
        self._ended = not chunk
        self._held, self._before, self.at = self._held[self.at :] + chunk, self._before + self.at, 0
        return not self._ended
