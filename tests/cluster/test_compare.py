"""How layouts are compared, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpillm.planning import hosts
from tests.cluster.compare import JobRun, compare


def test_layouts_differ_in_nothing_else_and_take_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, seconds = list[tuple[int, tuple[str, ...]]](), {"layout.replicas=2": 3.0, "": 1.25}

    def job(model: Path, ranks: int, lines: int, *settings: str) -> JobRun:
        asked.append((ranks, settings))
        slowly = 8.0 if len(asked) == 1 else 0.0  # of three rounds, one that was disturbed does not count
        own = 1.0 if ranks == 1 else seconds.get("".join(settings), 2.0)
        return JobRun(own + slowly, "1 x 1 x 1" if own < 1.5 else "others", 0.0)

    assert compare(job, tmp_path, tmp_path, 2, 1, "here") == 1 / 1.25
    first, second, third = (asked[at : at + 6] for at in (0, 6, 12))
    assert first == second[::-1] == third
    assert [ranks for ranks, _ in first] == [1, 2, 2, 2, 2, 2]
    said = capsys.readouterr().out.splitlines()
    assert "one rank     1.00 s (9.00 1.00 1.00)  1 x 1 x 1" in said[0]
    assert said[-1] == "here 1 answers: auto reaches 0.80 of the best (one rank)"


def test_chance_shows_beside_the_same_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def job(model: Path, ranks: int, lines: int, *settings: str) -> JobRun:
        replicas = settings == (f"layout.replicas={ranks}",)
        return JobRun(
            1.8 if replicas else 4.0 if settings else 2.0, "same" if replicas or not settings else "", 0
        )

    assert compare(job, tmp_path, tmp_path, 4, 32, "here", 1) == 0.9
    assert (
        "auto reaches 0.90 of the best (replicas), 0.90 of its layout set by hand" in capsys.readouterr().out
    )


def test_one_host_of_several_is_a_file_of_hosts(tmp_path: Path) -> None:
    files = list[str]()

    def job(model: Path, ranks: int, lines: int, *settings: str) -> JobRun:
        files.extend(one.removeprefix("layout.hosts=") for one in settings if "hosts" in one)
        return JobRun(1.0, "", 0.0)

    compare(job, tmp_path, tmp_path, 4, 32, "here", 1)
    machines = hosts.read(Path(files[0]), 4)
    assert machines.ranks == 4
    assert machines.slowest_first()[-1] == 0
