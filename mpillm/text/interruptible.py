"""Long work of a library in a thread of its own, so that the process can be interrupted meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOOK = 0.5  # seconds until a signal is handled at the latest


def interruptible(work: Callable[[], T], stack: int = 0) -> T:
    """Return or raise what `work` does; the work must let other threads run, as a library's may.

    `stack` is the size of the thread's stack in bytes, where the system's is too small; only what is used takes memory.

    Python handles signals between two instructions of the main thread, so it must not be the one that is away. If a
    handler raises an exception, the work is left alone and goes with the process.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def do() -> None:
        try:
            found.append(work())
        except BaseException as error:  # a Rust panic is a BaseException
            failed.append(error)

    thread = threading.Thread(target=do, daemon=True)
    before = threading.stack_size(stack)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    while (
        thread.is_alive()
    ):  # a signal between Python's look for signals and its wait is handled after the wait
        thread.join(LOOK)
    if failed:
        raise failed[0]
    return found[0]
