"""What the tests share keeps its own promises."""

from __future__ import annotations

import pytest

from tests.conftest import run_bounded


def test_a_process_in_another_session_does_not_outlast_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.conftest.LINGERS", 0.5)
    with pytest.raises(
        pytest.fail.Exception,
        match=r"no end within 0\.5 s: [^\n]+\s+begun\s+ended later: \['\d+: sleep 20'\]",
    ):
        run_bounded(["sh", "-c", "echo begun >&2; setsid sleep 20 & sleep 30"], 0.5)
