"""A script of a user has exact types, without names that a page does not show."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment, run_bounded

SCRIPT = """
from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpillm import LLM, Job, read_results
from mpillm.api.answers import Answer, Generation, Relevance, Score
from mpillm.errors import MpillmError

with LLM(Path("model"), ranks=2, memory={"kv": "64MiB"}) as llm:
    generations: list[Generation] = llm.generate(["a", "b"], max_tokens=8)
    of_ids: list[Generation] = llm.generate([[1, 2], [3]])
    chats: list[Generation] = llm.chat([{"role": "user", "content": "Hi"}])
    text: str = generations[0].text
    tokens: NDArray[np.int32] = generations[0].completions[0].tokens
    scores: list[Score] = llm.score(["a"])
    total: float = scores[0].total
    relevance: Relevance = llm.score("a", ["b"])
    ranking: list[int] = llm.rerank("a", ["b", "c"]).ranking
    stacked: NDArray[np.float32] = np.stack([answer.vector for answer in llm.embed(["a"])])
    labels: list[str] = [answer.label for answer in llm.classify("a")]
    stream: Generator[Answer, None, None] = llm.stream(["a", {"prompt": "b"}])
    stream.close()
results = Job(model="model", input=Path("prompts.jsonl"), output="out").run(ranks=2)
assert len(results.tokens[0]) and results.custom_ids[0]
llm.generate(5)  # wrong
llm.chat("a")  # wrong
LLM(3)  # wrong
"""


def test_a_script_of_a_user(tmp_path: Path) -> None:
    """Of all lines, and of those of the pages, only the wrong ones have an error."""
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    pages = "".join((ROOT / "docs" / page).read_text() for page in ("python.md", "tutorial-python.md"))
    blocks = re.findall(r"^```python\n(.*?)^```", pages, flags=re.M | re.S)
    script.write_text("\n".join([SCRIPT, *blocks]))
    words = [
        "--strict",
        "--follow-imports=silent",
        f"--cache-dir={tmp_path}",
        "--no-error-summary",
        str(script),
    ]
    done = run_bounded([sys.executable, "-m", "mypy", *words], env=clean_environment(), cwd=ROOT)
    wrong = [n for n, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")]
    assert sorted({int(line.split(":")[1]) for line in done.stdout.splitlines()}) == wrong, done.stdout
