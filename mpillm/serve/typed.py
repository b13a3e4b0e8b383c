"""Read the lines that are typed in a conversation. Unlike `input`, waiting for a line can be ended."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import Protocol

from mpillm.serve.arrivals import LOOK

ON_THE_WAY = 3.0  # seconds that the last lines may take from a launcher whose input has ended
PASTED = "\x1b[?2004l"  # what a terminal is told when a line has been read: to mark pasted texts no longer


class Typed(Protocol):
    """Called with a prompt it returns the next line; EOFError at the end, and once it was told to end."""

    def __call__(self, prompt: str) -> str: ...

    def end(self) -> None:
        """Wait for no line any more, from another thread."""


def typed(person: bool, ended: Callable[[], bool]) -> Typed:
    """Return the lines of the standard input.

    `person` says whether somebody types them, who wants to be asked; `ended` whether a launcher's own input has ended.
    """
    return Edited() if os.isatty(0) and os.isatty(1) else Plain(person, ended)


class Plain:
    """Lines of a pipe or a file, or of a terminal behind a launcher."""

    def __init__(self, asks: bool, no_more: Callable[[], bool]) -> None:
        self._asks, self._no_more = asks, no_more
        self._ended = False
        self._held = b""

    def end(self) -> None:
        self._ended = True

    def __call__(self, prompt: str) -> str:
        if self._asks:
            sys.stdout.write(prompt)
            sys.stdout.flush()
        while b"\n" not in self._held:
            try:
                more = os.read(0, 4096) if self._comes() else b""
            except OSError:  # there is no standard input
                more = b""
            if not more:
                break
            self._held += more
        line, end, self._held = self._held.partition(b"\n")
        if not (line or end):
            raise EOFError
        return line.decode(errors="replace")

    def _comes(self) -> bool:
        """Wait until there is something to read; False if there will be nothing."""
        since = None  # when the launcher's input was first seen to have ended
        while not self._ended:
            if select.select([0], [], [], LOOK)[0]:
                return True
            since = (since or time.monotonic()) if self._no_more() else None
            if since is not None and time.monotonic() - since > ON_THE_WAY:
                return False
        return False


class Edited:
    """Lines of a terminal, with readline's keys and history; a pasted text is one line, with its newlines."""

    def __init__(self) -> None:
        self._settings = termios.tcgetattr(0)
        self._ended = False
        with contextlib.suppress(ImportError):  # a Python without readline: plain lines
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")

    def end(self) -> None:
        self._ended = True

    def __call__(self, prompt: str) -> str:
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # A thread of its own waits for each, because nothing can end readline's wait.
        threading.Thread(target=self._read, args=(prompt, lines), daemon=True).start()
        while not self._ended:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=LOOK)
                if line is None:
                    raise EOFError
                return line
        termios.tcsetattr(0, termios.TCSADRAIN, self._settings)  # readline, still waiting, has its own
        os.write(1, PASTED.encode())
        raise EOFError

    @staticmethod
    def _read(prompt: str, lines: queue.SimpleQueue[str | None]) -> None:
        try:
            lines.put(input(prompt))
        except (EOFError, OSError, ValueError):
            lines.put(None)
