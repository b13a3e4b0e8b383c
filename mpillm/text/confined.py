"""Chat templates in a process of their own: a model's template is a program, and no one knows what it will do.

Jinja's sandbox keeps a template from Python's insides, but not from looping for ever or from making strings of
gigabytes, in more ways than can be listed (filters, methods, lists in lists in lists, what the compiler folds).
So rank 0 starts a child that knows nothing, has a limit of memory that the kernel enforces, and may write no files; and
each chat may take so much processor time there. What goes beyond costs the child its life and the request an error.

Both sides speak JSON, framed by its length, over a socket that is the child's standard input. The child ends
when the socket is closed, so it cannot outlive its parent by more than one chat.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mpillm.errors import Interrupted, RequestError
from mpillm.text.chat import REFUSES, ChatTemplate, Special

MAX_SECONDS = 5.0  # of processor time, for a chat
MAX_WAIT = 120.0  # seconds that a chat may take on a machine that is busy with other things
MAX_MEMORY = 1 << 30  # bytes that the child may have beyond what it starts with
MAX_ANSWER = 1 << 28  # bytes
MAX_DEATHS = 3  # after so many the template is not tried again
MAX_KILLS = 3  # that are not its doing: after so many in one chat the run ends

_LENGTH = struct.Struct("<Q")
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from mpillm.text.confined import serve; serve()"
_numbers = itertools.count()


class ConfinedTemplate:
    """A `ChatTemplate` whose work is done in the child; its answers and its errors are the same."""

    def __init__(
        self,
        source: str,
        control: Collection[str],
        variables: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._number = next(_numbers)
        self._definition = {"source": source, "control": sorted(control), "variables": dict(variables)}
        self._now = now
        self._deaths = 0

    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any] | None = None) -> str:
        """As `ChatTemplate.render`."""
        return str(self._ask("render", messages, options))

    def pieces(
        self, messages: list[dict[str, Any]], options: Mapping[str, Any] | None = None
    ) -> str | Special:
        """As `ChatTemplate.pieces`."""
        found = self._ask("pieces", messages, options)
        return found if isinstance(found, str) else [(str(text), bool(control)) for text, control in found]

    def _ask(self, what: str, messages: list[dict[str, Any]], options: Mapping[str, Any] | None) -> Any:
        if self._deaths >= MAX_DEATHS:
            raise RequestError(
                f"The model's chat template had to be ended {MAX_DEATHS} times; it is not tried again"
            )
        question = {
            "template": self._number,
            "what": what,
            "messages": messages,
            "options": dict(options or {}),
            "now": self._now().isoformat(),
            "seconds": MAX_SECONDS,
        }
        try:
            answer = self._answer(question)
        except _LostError as lost:
            self._deaths += 1
            raise RequestError(f"{REFUSES}: {lost}") from None
        if "error" in answer:
            raise RequestError(str(answer["error"]))
        return answer["result"]

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        child = _child()
        for _ in range(MAX_KILLS):
            question["define"] = None if self._number in child.knows else self._definition
            try:
                asked = json.dumps(question).encode()
            except (RecursionError, ValueError):
                raise RequestError("The messages are nested too deeply, or hold what JSON has not.") from None
            with contextlib.suppress(_KilledError):
                answer: dict[str, Any] = json.loads(child.ask(asked))
                child.knows.add(self._number)
                return answer
        raise Interrupted(
            f"The process that applies the model's chat template was killed {MAX_KILLS} times (by the kernel, for "
            "want of memory?); the same command goes on from here."
        )


class _LostError(Exception):
    """The child has ended instead of answering; says why."""


class _KilledError(Exception):
    """The child was killed from outside, which is not the template's doing."""


class _Child:
    """The process that templates run in; it is started when it is needed, and again after it was lost."""

    def __init__(self) -> None:
        self.knows: set[int] = set()  # templates that this process has been sent
        self._running: tuple[socket.socket, subprocess.Popen[bytes]] | None = None

    def ask(self, question: bytes) -> bytes:
        """The answer; _LostError or _KilledError if the process ends before it."""
        if self._running is None:
            self._running = _start()
        parent, process = self._running
        until = time.monotonic() + MAX_WAIT
        try:
            _send(parent, question, until)
            return _receive(parent, until)
        except TimeoutError:
            raise _LostError(f"it takes more than {MAX_WAIT:g} seconds") from None
        except OSError:
            self.close()
            if process.returncode in (-signal.SIGKILL, -signal.SIGTERM):
                raise _KilledError from None
            if process.returncode == -signal.SIGPROF:
                raise _LostError(f"it takes more than {MAX_SECONDS:g} seconds") from None
            raise _LostError(f"its process ended with exit code {process.returncode}") from None
        finally:
            if sys.exc_info()[0]:  # also an interruption: what comes is no answer to the next question
                self.close()

    def close(self) -> None:
        """End the process."""
        self.knows.clear()
        if self._running is not None:
            parent, process = self._running
            self._running = None
            parent.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.kill()
            process.wait()


def _start() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-c", _CHILD, *sys.path, str(Path(__file__).resolve().parents[2])]
    with theirs:
        return ours, subprocess.Popen(
            words,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # else who reads mpiexec's output would wait for the child's end
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for its parent
        )


@functools.cache
def _child() -> _Child:
    """This process's child."""
    child = _Child()
    atexit.register(child.close)
    return child


def serve() -> None:
    """What the child does until its standard input is closed."""
    _confine()
    parent, templates = socket.socket(fileno=os.dup(0)), _Templates()
    with contextlib.suppress(OSError):  # the parent is gone
        while True:
            question = json.loads(_receive(parent))
            signal.setitimer(signal.ITIMER_PROF, question["seconds"])  # its signal ends the process
            answer = templates.answer(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(parent, answer)


def _confine() -> None:
    """Leave this process the memory that it has and MAX_MEMORY more, and no way to write files."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    for limit, value in (
        (resource.RLIMIT_DATA, pages * resource.getpagesize() + MAX_MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        most = resource.getrlimit(limit)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


class _Templates:
    """The child's templates, by their numbers."""

    def __init__(self) -> None:
        self._known: dict[int, ChatTemplate] = {}
        self._now = datetime.min

    def answer(self, question: dict[str, Any]) -> bytes:
        """The result, or the error, as JSON."""
        number = question["template"]
        if question["define"] is not None:
            self._known[number] = ChatTemplate(**question["define"], now=lambda: self._now)
        self._now = datetime.fromisoformat(question["now"])
        work = getattr(self._known[number], question["what"])
        try:
            return json.dumps({"result": work(question["messages"], question["options"])}).encode()
        except RequestError as error:
            return json.dumps({"error": str(error)}).encode()
        except MemoryError:
            said = f"{REFUSES}: it takes more than {MAX_MEMORY >> 30} GiB of memory"
            return json.dumps({"error": said}).encode()


def _send(to: socket.socket, data: bytes, until: float | None = None) -> None:
    for part in (_LENGTH.pack(len(data)), data):
        _limit(to, until)
        to.sendall(part)


def _receive(by: socket.socket, until: float | None = None) -> bytes:
    """The next message; OSError if there is none."""
    (length,) = _LENGTH.unpack(_read(by, _LENGTH.size, until))
    if until is not None and length > MAX_ANSWER:
        raise OSError("too long an answer")
    return _read(by, length, until)


def _read(by: socket.socket, length: int, until: float | None) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        _limit(by, until)
        if not (count := by.recv_into(view)):
            raise ConnectionResetError("the other side has closed")
        view = view[count:]
    return bytes(data)


def _limit(which: socket.socket, until: float | None) -> None:
    if until is not None:
        which.settimeout(max(until - time.monotonic(), 0.001))
