"""Signals that end something in order: what the first one does, and that the next one is not held back."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from mpillm.comm.launch import STOPS


@contextlib.contextmanager
def first_signal_calls(
    function: Callable[[], object], on_sigint: Callable[[], object] | None = None
) -> Iterator[None]:
    """Within the block the first signal that stops a command calls `function`; the next one does what it did before.

    With `on_sigint` every SIGINT calls that instead.
    """

    def handle(number: int, _frame: object) -> None:
        if on_sigint is not None and number == signal.SIGINT:
            on_sigint()
        else:
            restore()
            function()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield
    finally:
        restore()
