"""A process that hangs, and one that only looks like it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mpillm.comm import stillness
from mpillm.comm.stillness import Stillness

SLEEPS, WAITS = "7 (a b) c) S 1", "7 (a b) c) D 1"


def test_who_waits_for_a_core_or_a_disk_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crowded machine may give a process no core for longer than the deadline."""
    monkeypatch.setattr(stillness, "_TASKS", str(tmp_path))
    monkeypatch.setattr(time, "process_time", lambda: 5.0)
    monkeypatch.setattr(time, "thread_time", lambda: 1.0)
    thread = tmp_path / "7"
    thread.mkdir()

    def now(stat: str, queued: float) -> bool:
        (thread / "stat").write_text(stat)
        (thread / "schedstat").write_text(f"123456 {int(queued * 1e9)} 9\n")
        time.sleep(0.001)
        return watching.look()

    watching = Stillness()
    assert not now(SLEEPS, 40.0)
    assert now(SLEEPS, 40.0)
    assert not now(SLEEPS, 42.0), "it was in the queue for a core"
    assert now(SLEEPS, 42.0)
    assert not now(WAITS, 42.0), "it waits for a disk"
    now(SLEEPS, 42.0)
    (thread / "schedstat").unlink()
    watching.look()
    assert watching.look(), "a system without that statistic"
