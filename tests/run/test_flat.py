"""What a line of the input costs does not depend on how many lines there are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mpillm.cli import main
from tests.job_helpers import CHAT

LINES = (256, 512, 768)


def _cost(folder: Path, count: int, capsys: pytest.CaptureFixture[str]) -> int:
    """How many functions a run of so many lines calls on rank 0."""
    folder.mkdir()
    with (folder / "in.jsonl").open("w") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": [3 + number % 97, 3 + number // 97], "max_tokens": 1}) + "\n")
    calls = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    words = ["--model", str(CHAT), "--input", str(folder / "in.jsonl"), "--output", str(folder / "out")]
    settings = [
        "--set=memory.kv=16MiB",
        "--set=memory.max_context=64",
        "--set=batch.max_num_seqs=32",
        "--set=layout.threads=1",
    ]
    sys.setprofile(profile)
    try:
        status = main(["run", *words, *settings])
    finally:
        sys.setprofile(None)
    capsys.readouterr()
    assert status == 0
    return calls


@pytest.mark.slow
def test_a_line_costs_the_same_however_many_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _cost(tmp_path / "first", 10, capsys)  # what is imported and compiled once
    few, more, maximum = (_cost(tmp_path / str(count), count, capsys) for count in LINES)
    assert maximum - more == pytest.approx(more - few, rel=0.05)
