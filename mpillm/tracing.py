"""Spans of a run for `--trace`: what a thread did, from when, for how long. Off, each costs a look at one name.

A rank keeps its last spans; what they were for, how many there were and how long they took is counted of all.
Times are those of `time.monotonic`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Span(NamedTuple):
    """Something that a thread did. Spans of one thread lie beside or inside each other."""

    name: str
    start: float  # seconds
    seconds: float
    thread: tuple[int, str]  # the number and the name of the thread
    detail: dict[str, int | str]


@dataclass
class Sum:
    """All spans of one name."""

    count: int = 0
    seconds: float = 0.0


@dataclass
class Recorder:
    """The last `spans` of a process, and the sums of all."""

    spans: deque[Span]
    sums: dict[str, Sum] = field(default_factory=dict)
    # How far the clock of day is ahead, in seconds.
    ahead: float = field(default_factory=lambda: time.time() - time.monotonic())
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, span: Span) -> None:
        """Keep a span, and add it to the sums of its name; from any thread."""
        with self._lock:
            self.spans.append(span)
            total = self.sums.setdefault(span.name, Sum())
            total.count += 1
            total.seconds += span.seconds


_recorder: Recorder | None = None


def start(spans: int) -> Recorder:
    """Record from now on; only the last `spans` spans are kept."""
    global _recorder  # noqa: PLW0603 -- what is recorded is done everywhere, and a process has one trace
    _recorder = Recorder(deque(maxlen=spans))
    return _recorder


def stop() -> None:
    """Record no more."""
    global _recorder  # noqa: PLW0603
    _recorder = None


def active() -> bool:
    """Return whether spans are recorded: asked before the words of one are made where that takes time."""
    return _recorder is not None


def add(name: str, start: float, seconds: float, **detail: int | str) -> None:
    """This thread has done something, if spans are recorded."""
    if _recorder is not None:
        thread = threading.current_thread()
        _recorder.add(Span(name, start, seconds, (thread.ident or 0, thread.name), detail))


def spent(name: str, seconds: float) -> None:
    """This thread has just spent `seconds` seconds on `name`."""
    if _recorder is not None and seconds:
        add(name, time.monotonic() - seconds, seconds)


@contextlib.contextmanager
def span(name: str, **detail: int | str) -> Iterator[None]:
    """Record the block as a span. A block costs a microsecond, so use it for what is rare."""
    if _recorder is None:
        yield
        return
    start = time.monotonic()
    try:
        yield
    finally:
        add(name, start, time.monotonic() - start, **detail)
