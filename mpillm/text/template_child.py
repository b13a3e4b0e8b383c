"""The process in which chat templates run (see `confined`): it limits itself, and answers until it is told to end."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from mpillm.errors import RequestError
from mpillm.text.bounds import TooLongError
from mpillm.text.chat import ChatTemplate
from mpillm.text.content import REFUSES
from mpillm.text.framing import receive, send

MAX_MEMORY = 1 << 30  # bytes that this process may have beyond what it starts with


def serve() -> None:
    """Answer questions until the standard input is closed; this is what the child runs."""
    confine()
    parent, templates = socket.socket(fileno=os.dup(0)), _Templates()
    with contextlib.suppress(OSError):  # the parent is gone
        while True:
            question = json.loads(receive(parent))
            signal.setitimer(signal.ITIMER_PROF, question["seconds"])  # its signal ends the process
            answer = templates.answer(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(parent, answer)


def confine() -> None:
    """Limit this process to MAX_MEMORY more than it has now, and let it write no files."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    for limit, value in (
        (resource.RLIMIT_DATA, pages * resource.getpagesize() + MAX_MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        maximum = resource.getrlimit(limit)[1]
        value = value if maximum == resource.RLIM_INFINITY else min(value, maximum)
        resource.setrlimit(limit, (value, value))


class _Templates:
    """The child's templates, by their numbers."""

    def __init__(self) -> None:
        self._known: dict[int, ChatTemplate] = {}
        self._now = datetime.min

    def answer(self, question: dict[str, Any]) -> bytes:
        """Return the result, or the error, as JSON."""
        number = question["template"]
        if question["define"] is not None:
            self._known[number] = ChatTemplate(**question["define"], now=lambda: self._now)
        self._now = datetime.fromisoformat(question["now"])
        work = getattr(self._known[number], question["what"])
        error, too_long = "", False
        try:
            result = work(question["messages"], question["options"], question["max_chars"])
            return json.dumps({"result": result}).encode()
        except RequestError as found:
            error, too_long = str(found), isinstance(found, TooLongError)
        except MemoryError:
            error = f"{REFUSES}: it takes more than {MAX_MEMORY >> 30} GiB of memory"
        return json.dumps({"error": error, "too_long": too_long}).encode()
