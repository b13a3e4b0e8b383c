"""A signal that stops a command, wherever it comes."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from mpillm.comm.running import run_alone
from mpillm.errors import Interrupted


def test_a_signal_while_a_thread_starts_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python 3.11 then raises a KeyError of its own, with the Interrupted as its context."""
    begin = threading._start_new_thread  # type: ignore[attr-defined]

    def begin_and_interrupt(*arguments: Any) -> None:
        begin(*arguments)
        while threading._limbo:  # type: ignore[attr-defined]
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # the handler runs here

    def program() -> int:
        monkeypatch.setattr(threading, "_start_new_thread", begin_and_interrupt)
        threading.Thread(target=time.sleep, args=(0,)).start()
        return 0

    assert run_alone(program) == Interrupted.exit_code
    assert capsys.readouterr().err == "mpillm: Stopped by SIGINT; run the same command again to continue.\n"
