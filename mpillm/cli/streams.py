"""Standard output and error that never fail, so that no display changes what a command does.

A pipe may be closed, a device full, a stream closed before the start, and a locale may lack a character. The results
are in files; what cannot be shown is replaced or dropped.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

from mpillm.cli.terminal import blank, fitted, terminal_of_launcher

# Control characters (C0, DEL, C1), line and paragraph separators, marks that reorder text, and surrogates: what acts on
# a terminal instead of being shown.
_ACTS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_QUOTED = re.compile(r"(?<!\\)\\udc([89a-f][0-9a-f])")  # a byte that was no UTF-8, as repr has it
_OURS = re.compile(r"mpillm( [\w-]+)?: ")  # how a sentence to the user begins


def visible(text: str, keep: str = "") -> str:
    """Return the text with an escape such as \\x1b for each character that would act on a terminal, but for `keep`."""

    def escape(found: re.Match[str]) -> str:
        char, code = found[0], ord(found[0])
        if char in keep:
            return char
        if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8, as Python's paths have it
            return f"\\x{code - 0xDC00:02x}"
        return _NAMES.get(char) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")

    return _ACTS.sub(escape, text)


class Unfailing(io.TextIOBase):
    """Writes to a stream until that fails, and to nowhere from then on; controls nothing but lines.

    On a terminal each sentence of mpillm has its own lines, broken between words.
    """

    def __init__(self, stream: TextIO | None, beside: Unfailing | None = None) -> None:
        """`beside` is another one, on the same terminal."""
        self._stream, self._beside = stream, beside
        self._last = "\n"  # the last character that was written
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        """The attributes that `input` needs to read a line with readline."""
        return "replace"

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        shown = visible(text, keep="\n\r\t").encode(self._encoding, "replace").decode(self._encoding)
        if self._stream is not None and _OURS.match(shown):
            begun = self._last + (self._beside._last if self._beside else "")
            # A live line, which another thread has drawn, or an answer stays; the `^C` of who stops a command goes.
            before = "\n" if begun.strip("\n\r") else blank(self._stream)
            shown = before + fitted(_QUOTED.sub(r"\\x\1", shown), self._stream)
        self._last = shown[-1:] or self._last
        self._try("write", shown)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("there is no such stream")
        return self._stream.fileno()

    def _try(self, what: str, *arguments: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, what)(*arguments)
        except (OSError, ValueError):
            broken, self._stream = self._stream, None
            with contextlib.suppress(
                OSError, ValueError
            ):  # else Python fails at its end, when it flushes the rest
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, broken.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Within the block sys.stdout and sys.stderr never fail, and no other file gets the descriptors 0, 1 and 2."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    before = sys.stdout, sys.stderr
    out = Unfailing(terminal_of_launcher(1) or sys.stdout)
    error = Unfailing(terminal_of_launcher(2) or sys.stderr, beside=out)
    sys.stdout, sys.stderr = out, error
    try:
        yield
    finally:
        out.flush()
        error.flush()
        sys.stdout, sys.stderr = before
