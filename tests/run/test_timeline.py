"""The report's timeline: from beginning to end, also of what is generated before anything is answered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environment, run_bounded
from tests.e2e.jobs import CHAT, write_lines

OFTEN = """
import sys
from mpillm.cli import main
from mpillm.run import computation

computation.SAMPLE = computation.PART = 0.0
sys.exit(main(["run", "--model", sys.argv[1], "--input", sys.argv[2], "--output", sys.argv[3]]))
"""


@pytest.mark.mpiexec
def test_answers_that_end_together_have_a_timeline(tmp_path: Path) -> None:
    body = {"prompt": "the quick brown fox", "max_tokens": 8, "ignore_eos": True}
    source = write_lines(tmp_path / "in.jsonl", [body] * 3)
    (tmp_path / "often.py").write_text(OFTEN)
    words = [sys.executable, tmp_path / "often.py", CHAT, source, tmp_path / "out"]
    done = run_bounded(words, env=clean_environment())
    assert done.returncode == 0, done.stderr
    times, generated, finished = zip(
        *json.loads((tmp_path / "out/report.json").read_text())["timeline"], strict=True
    )
    assert (times[0], generated[0], finished[0]) == (0.0, 0, 0)
    assert (generated[-1], finished[-1]) == (24, 3)
    assert sum(tokens > 0 and not answered for tokens, answered in zip(generated, finished, strict=True)) > 3
    assert list(times) == sorted(times)
