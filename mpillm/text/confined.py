"""Chat templates in a process of their own: a model's template is a program, and no one knows what it will do.

Jinja's sandbox keeps a template from Python's insides, but not from looping for ever or from making strings of
gigabytes, in more ways than can be listed (filters, methods, lists in lists in lists, what the compiler folds).
Rank 0 therefore starts a child that knows nothing, has a limit of memory that the kernel enforces, and may write no
files; each chat may take a limited processor time there. What goes beyond costs the child its life and the chat's
line an error; the next chat gets a new child. Only a template that ends the child for every chat, a plain one
included, is not tried any more.

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
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mpillm.errors import Interrupted, RequestError
from mpillm.text.bounds import MAX_CHARS, TooLongError
from mpillm.text.content import REFUSES, Message, Pieces
from mpillm.text.framing import receive, send

MAX_SECONDS = 5.0  # seconds of processor time for a chat
MAX_WAIT = 120.0  # seconds that a chat may take on a machine that is busy with other things
MAX_DEPTH = 64  # levels of lists and objects in each other in a chat
MAX_VALUES = 1 << 20  # the maximum number of values in a chat
FEW_CHARS = 1 << 16  # characters that a chat may always have; a template may drop most of them
# After MAX_DEATHS deaths without any answer a plain chat is tried; if that fails, the template is not tried again.
MAX_DEATHS = 3
MAX_KILLS = 3  # the maximum number of times that the child may be killed from outside during one chat
PLAIN: list[Message] = [{"role": "user", "content": "hello"}]

_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from mpillm.text.template_child import serve; serve()"
_numbers = itertools.count()


class ConfinedTemplate:
    """A `ChatTemplate` that works in the child, with the same answers and errors."""

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
        self._deaths = 0  # how often the child died during work on this template
        self._answers = False  # has given one, so it is not to blame for what ends the child

    def render(
        self, messages: list[Message], options: Mapping[str, Any] | None = None, max_chars: int = MAX_CHARS
    ) -> str:
        """Render a chat like `ChatTemplate.render`."""
        return str(self._ask("render", messages, options, max_chars))

    def pieces(
        self, messages: list[Message], options: Mapping[str, Any] | None = None, max_chars: int = MAX_CHARS
    ) -> str | Pieces:
        """Return a chat's pieces like `ChatTemplate.pieces`."""
        found = self._ask("pieces", messages, options, max_chars)
        return found if isinstance(found, str) else [(str(text), bool(control)) for text, control in found]

    def _ask(
        self, what: str, messages: list[Message], options: Mapping[str, Any] | None, max_chars: int
    ) -> Any:
        _check_size([messages, options], max_chars)
        if self._given_up():
            raise RequestError(
                f"The model's chat template was stopped {self._deaths} times, for a plain chat too; it is "
                "not tried again"
            )
        try:
            answer = self._answer(self._question(what, messages, options, max_chars))
        except _LostError as lost:
            self._deaths += 1
            raise RequestError(f"{REFUSES}: {lost}") from None
        self._answers = True
        if "error" in answer:
            raise (TooLongError if answer["too_long"] else RequestError)(str(answer["error"]))
        return answer["result"]

    def _given_up(self) -> bool:
        """Return whether the template has ended the child for every chat so far, and for a plain one."""
        if not self._answers and self._deaths == MAX_DEATHS:
            try:
                self._answer(self._question("render", PLAIN, None, MAX_CHARS))
            except _LostError:
                self._deaths += 1
            else:
                self._answers = True
        return not self._answers and self._deaths > MAX_DEATHS

    def _question(
        self, what: str, messages: list[Message], options: Mapping[str, Any] | None, max_chars: int
    ) -> dict[str, Any]:
        return {
            "template": self._number,
            "what": what,
            "messages": messages,
            "options": dict(options or {}),
            "max_chars": max_chars,
            "now": self._now().isoformat(),
            "seconds": MAX_SECONDS,
        }

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        child = _child()
        for _ in range(MAX_KILLS):
            question["define"] = None if self._number in child.knows else self._definition
            try:
                asked = json.dumps(question).encode()
            except ValueError:
                raise RequestError("The messages hold values that JSON does not have.") from None
            with contextlib.suppress(_KilledError):
                answer: dict[str, Any] = json.loads(child.ask(asked))
                child.knows.add(self._number)
                return answer
        if question["messages"] is PLAIN:
            raise Interrupted(
                f"The process that applies the model's chat template was killed {MAX_KILLS} times (by the "
                "kernel, for lack of memory?); run the same command again to continue."
            )
        self._answer(self._question("render", PLAIN, None, MAX_CHARS))
        raise _LostError(f"its process was killed {MAX_KILLS} times (by the kernel, for lack of memory?)")


def _check_size(chat: Any, max_chars: int) -> None:
    """Raise RequestError if the values of a chat are nested too deeply or too many, or if it is longer than it may be.

    A template may leave out some of the words, so they may be a few times as many as those of the rendered chat.
    """
    maximum, level, values, chars = max(4 * max_chars, FEW_CHARS), [chat], 0, 0
    for _ in range(MAX_DEPTH + 1):
        values += len(level)
        chars += sum(len(value) for value in level if isinstance(value, str))
        if values > MAX_VALUES:
            raise RequestError(f"The messages hold more than {MAX_VALUES} values.")
        if chars > maximum:
            raise TooLongError(f"more than {maximum} characters in its messages")
        below = [value for value in level if isinstance(value, (dict, list, tuple))]
        level = [item for value in below for item in value]
        level += [item for value in below if isinstance(value, dict) for item in value.values()]
        if not level:
            return
    raise RequestError(f"The messages are nested more than {MAX_DEPTH} levels deep.")


class _LostError(Exception):
    """The child ended instead of answering; the message says why."""


class _KilledError(Exception):
    """The child was killed from outside, so the template is not to blame."""


class _Child:
    """The process in which templates run; it is started when it is needed, and again after it has ended."""

    def __init__(self) -> None:
        self.knows: set[int] = set()  # templates that this process has been sent
        self._running: tuple[socket.socket, subprocess.Popen[bytes]] | None = None

    def ask(self, question: bytes) -> bytes:
        """Return the answer; raise _LostError or _KilledError if the process ends before it gives one."""
        if self._running is None:
            self._running = _start()
        parent, process = self._running
        until = time.monotonic() + MAX_WAIT
        try:
            send(parent, question, until)
            return receive(parent, until)
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

    def peak(self) -> int:
        """Maximum bytes that the process has had for itself; 0 if it does not run."""
        if self._running is None:
            return 0
        status = Path(f"/proc/{self._running[1].pid}/status")
        with contextlib.suppress(OSError):  # it has ended, or there is no /proc
            kib = dict(re.findall(r"^(VmHWM|RssFile):\s+(\d+) kB", status.read_text(), flags=re.MULTILINE))
            return 1024 * max(int(kib.get("VmHWM", 0)) - int(kib.get("RssFile", 0)), 0)
        return 0

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


def template_process_peak() -> int:
    """Maximum bytes that this process's child has had for itself; 0 if there is none."""
    return _child().peak()


@functools.cache
def _child() -> _Child:
    """This process's child."""
    child = _Child()
    atexit.register(child.close)
    return child
